# shellcheck shell=bash
# What tools/sft.slurm and tools/gppo.slurm share. They source it; it runs in the batch script, on the job's first node.
#
# A job has these steps, each with a log of its own per attempt, run.dir/logs/STEP-JOB-ATTEMPT.log:
#   check     judges the settings on the first node, in a second or two
#   engines   rollout engines on the last KLEAR_ENGINE_NODES nodes, if any
#   train     torchrun on all other nodes, one task per node, rendezvous on the first
#
# How it ends. torchrun turns every exit status but 0 into 1, so rank 0 leaves its own in the file KLEAR_STATUS_FILE:
#   0  done               the job ends
#   2  bad input          the job ends: the same input would be refused again
#   1  failed             the job ends: look at the log; submitted again, it resumes. So it does when all engines gave up
#   75 stopped and saved  the job is requeued and resumes, KLEAR_MAX_RESTARTS times at most
# After a node failure, or a preemption without time to save, Slurm itself requeues; those restarts count too, and the
# run goes on from its last checkpoint.
#
# A preemption with time to save comes as USR1 to this script or, by Slurm's default, as SIGTERM to every process of
# every step and nothing to this script. Ranks act on that, torchrun and the check do not, and engines end.

readonly BAD_INPUT=2 RESUMABLE=75
readonly GIVE_UP_SECONDS=120 # that a trainer without engines may take to save

# run_job ENTRY NAME ARGUMENTS...: the whole job. ENTRY is train_sft or train_rl, NAME that of the file in tools/.
run_job() {
    entry=$1
    local name=$2
    shift 2
    local usage="usage: sbatch [SBATCH OPTIONS] tools/$name CONFIG.yaml [MORE.yaml ...] [section.field=value ...]"
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        printf '%s\n\n' "$usage"
        sed -n '2,/^set /{/^set /d;/SBATCH -/!s/^# \{0,1\}//;p}' "tools/$name"
        exit 0
    fi
    if (($# == 0)) || [[ $1 == *=* || $1 == -* ]]; then
        refuse "CONFIG.yaml: the settings file must come first" "$usage"
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is not a Slurm job; submit it" "$usage"

    job=$SLURM_JOB_ID attempt=${SLURM_RESTART_COUNT:-0}
    warned='' # Slurm is about to end this job: stop, save, requeue
    ended=''  # Slurm ends this job now, and knows itself whether it comes back
    logs='' trainer='' engines='' engines_log='' gave_up=''
    trap 'warned=1; ask_trainer_to_stop' USR1
    trap 'ended=1' TERM

    read_allocation
    check_settings "$@"
    if ((attempt > max_restarts)); then
        say "restarted $attempt times, more than KLEAR_MAX_RESTARTS=$max_restarts; submit it again to go on"
        exit 1
    fi
    start_engines
    start_trainer "$@"
    wait_for_trainer
    stop_engines
    finish
}

say() {
    local line
    line="$(date '+%F %T') job $job, attempt $attempt: $*"
    echo "$line"
    [[ -z $logs ]] || echo "$line" >>"$logs/job-$job.log"
}

refuse() {
    printf '%s\n' "$@" >&2
    exit $BAD_INPUT
}

# number NAME DEFAULT LEAST: sets `number` to the value of a variable that counts something.
number() {
    number=${!1:-$2}
    if [[ ! $number =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((number < $3)); then
        refuse "$1: got '$number', expected a whole number of at least $3"
    fi
}

# Nodes, ranks and limits of this job, from Slurm's variables and from ours.
read_allocation() {
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    gpus=${SLURM_GPUS_ON_NODE:-0}
    number KLEAR_RANKS_PER_NODE "$((gpus > 0 ? gpus : 1))" 1 && ranks=$number
    number KLEAR_MAX_RESTARTS 100 0 && max_restarts=$number
    number KLEAR_PORT "$((20000 + job % 10000))" 1 && port=$number
    number KLEAR_ENGINE_NODES 0 0 && local engine_count=$number
    if ((engine_count)) && [[ $entry == train_sft ]]; then
        refuse "KLEAR_ENGINE_NODES: got $engine_count, but fine-tuning has no rollouts; unset it"
    fi
    ((engine_count < ${#nodes[@]})) || refuse "KLEAR_ENGINE_NODES: got $engine_count of the job's ${#nodes[@]} nodes, \
and the trainer needs at least one; submit with a larger --nodes"
    train_nodes=("${nodes[@]:0:${#nodes[@]}-engine_count}")
    engine_nodes=("${nodes[@]:${#nodes[@]}-engine_count}")
    world_size=$((${#train_nodes[@]} * ranks))

    local venv=${KLEAR_VENV:-$PWD/.venv}
    [[ ! -x $venv/bin/python ]] || PATH=$venv/bin:$PATH
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
    read -ra srun_options <<<"${KLEAR_SRUN_OPTIONS:-}"
    # The one task of a node owns all of its CPUs; where Slurm binds none, the option would only earn a warning per step.
    [[ $(scontrol show config) == *task/none* ]] || srun_options=(--cpu-bind=none "${srun_options[@]}")
    ((gpus)) || say "no GPUs in this allocation (--gpus-per-node asks for them): $ranks processes per node on CPUs"
    name_engines
}

# Where rollout engines will listen, as settings of the trainer; nothing without engine nodes.
name_engines() {
    local node index at urls=''
    engine_settings=()
    ((${#engine_nodes[@]})) || return 0
    number KLEAR_ENGINE_TP 1 1 && engine_tp=$number
    number KLEAR_ENGINES_PER_NODE "$((gpus > engine_tp ? gpus / engine_tp : 1))" 1 && engines_per_node=$number
    ((!gpus || engines_per_node * engine_tp <= gpus)) || refuse "KLEAR_ENGINES_PER_NODE: got $engines_per_node engines \
of KLEAR_ENGINE_TP=$engine_tp, which need $((engines_per_node * engine_tp)) GPUs of a node, and it has $gpus; make one \
of them smaller"
    number KLEAR_ENGINE_PORT 30000 1 && engine_port=$number
    KLEAR_ENGINE_ADDRESSES=''
    for node in "${engine_nodes[@]}"; do
        at=$(address "$node")
        KLEAR_ENGINE_ADDRESSES+="$node=$at "
        for ((index = 0; index < engines_per_node; index++)); do
            urls+=,http://$at:$((engine_port + index))
        done
    done
    export KLEAR_ENGINE_ADDRESSES # for tools/slurm_engines.sh, which may run in a container without Slurm's programs
    number KLEAR_ENGINE_SECONDS 1800 0
    engine_settings=(rollout.engine=sglang "sglang.urls=[${urls#,}]" "sglang.connect_seconds=$number")
}

# address NODE: what Slurm itself calls this node by; a node's name need not resolve.
address() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }

# run_step NAME NODES... -- COMMAND...: one task on each of the nodes, told apart by SLURM_PROCID; output to $log if set.
run_step() {
    local name=$1 nodes=() linger=120
    [[ $name != engines ]] || linger=0 # the trainer goes on with the engines that are left
    shift
    while [[ $1 != -- ]]; do nodes+=("$1") && shift; done
    shift
    # --wait: once one node has ended, how many seconds the others may go on (0: as long as they like).
    srun --job-name="klear-$name" --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 \
        --nodelist="$(IFS=, && echo "${nodes[*]}")" --wait="$linger" --kill-on-bad-exit=0 --input=none --open-mode=append \
        "${srun_options[@]}" ${log:+--output="$log"} "$@"
}

# Refuses bad settings with status 2 before any node is kept busy, and finds out where the run keeps its logs.
check_settings() {
    local found status=0 log=''
    # A preemption's SIGTERM must not look like settings that are refused.
    # shellcheck disable=SC2016  # expanded on the node
    found=$(run_step check "${train_nodes[0]}" -- env WORLD_SIZE="$world_size" LOCAL_WORLD_SIZE="$ranks" \
        bash -c 'trap "" TERM; exec "$@"' check \
        python -m "megatron_klear.$entry" --check "$@" "${engine_settings[@]}") || status=$?
    if ((status)); then
        say "the check of the settings ended with status $status (2: refused); nothing was started"
        exit "$status"
    fi
    run_dir=$(sed -n 's/^run\.dir: //p' <<<"$found")
    hf_dir=$(sed -n 's/^model\.hf_dir: //p' <<<"$found")
    read -ra engine_options < <(sed -n 's/^engine options: //p' <<<"$found") || true
    mkdir -p "$run_dir/logs" || exit $BAD_INPUT
    logs=$run_dir/logs
    printf '%s\n' "$found" >"$logs/check-$job-$attempt.log"
    say "${#train_nodes[@]} nodes x $ranks ranks train, ${#engine_nodes[@]} nodes serve; logs in $logs"
    if ((${#engine_nodes[@]})) && [[ -z ${KLEAR_ENGINE_MODEL:-$hf_dir} ]]; then
        refuse "KLEAR_ENGINE_MODEL: unset, and so is model.hf_dir; engines need a Hugging Face directory to start from"
    fi
}

start_engines() {
    ((${#engine_nodes[@]})) || return 0
    local log=$logs/engines-$job-$attempt.log python=${KLEAR_SGLANG_VENV:-$PWD/.venv-sglang}/bin/python options
    engines_log=$log
    # Where the trainer asks for the end of an engine that hangs.
    engine_settings+=("sglang.restart_requests=$logs/.restart-engines-$job-$attempt")
    export KLEAR_ENGINE_REQUESTS=$logs/.restart-engines-$job-$attempt
    mkdir -p "$KLEAR_ENGINE_REQUESTS"
    read -ra options <<<"${KLEAR_ENGINE_OPTIONS:-}"
    # Those that make a server fit the run come first, so that KLEAR_ENGINE_OPTIONS may say otherwise. Prompt and response
    # together may be longer than the model's positions by the length of the prompt; SGLang wants to be told.
    SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 run_step engines "${engine_nodes[@]}" -- bash tools/slurm_engines.sh "$engines_per_node" "$engine_tp" "$engine_port" \
        "$python" -m sglang.launch_server --model-path "${KLEAR_ENGINE_MODEL:-$hf_dir}" "${engine_options[@]}" \
        "${options[@]}" &
    engines=$!
    say "engines start on ${engine_nodes[*]}: ${engine_settings[1]}"
}

start_trainer() {
    local log=$logs/train-$job-$attempt.log master
    status_file=$logs/.status-$job-$attempt pid_file=$logs/.torchrun-$job-$attempt
    rm -f "$status_file" "$pid_file"
    [[ -z $warned && -z $ended ]] || return 0
    master=$(address "${train_nodes[0]}")
    # torchrun gives its ranks 30 s after a SIGTERM and ends them: too short to finish a step and save. So it ignores
    # the one that Slurm sends to every process before it ends a job, and so do helpers; the ranks act on it.
    # shellcheck disable=SC2016  # expanded on the nodes
    KLEAR_STATUS_FILE=$status_file KLEAR_PID_FILE=$pid_file run_step train "${train_nodes[@]}" -- bash -c '
        trap "" TERM
        ((SLURM_PROCID)) || echo $$ >"$KLEAR_PID_FILE"
        exec python -m torch.distributed.run --nnodes "$1" --nproc-per-node "$2" --node-rank "$SLURM_PROCID" \
            --master-addr "$3" --master-port "$4" --signals-to-handle SIGINT,SIGHUP,SIGQUIT -m "${@:5}"' \
        torchrun "${#train_nodes[@]}" "$ranks" "$master" "$port" "megatron_klear.$entry" "$@" "${engine_settings[@]}" &
    trainer=$!
    # A warning that came while it was being started found nobody to ask.
    [[ -z $warned ]] || ask_trainer_to_stop
    say "training on ${train_nodes[*]}: $log"
}

# SIGTERM to the ranks of this node; one rank is enough, they all agree at the end of the step. Repeated, because a rank
# that is still starting does not listen yet.
ask_trainer_to_stop() {
    say "${1:-told that the job is about to end; the trainer stops at the end of its step}"
    [[ -n $trainer ]] || return 0
    while kill -0 "$trainer" 2>/dev/null; do
        [[ ! -s $pid_file ]] || pkill -TERM --parent "$(<"$pid_file")" || true
        sleep 5
    done &
}

# To the trainer's end. Engines that end before it have all given up or, with status 0, were told to end by Slurm before
# a preemption; the trainer would wait for them in vain.
wait_for_trainer() {
    local deadline=''
    [[ -n $trainer ]] || return 0
    while kill -0 "$trainer" 2>/dev/null; do
        if [[ -z $engines || -n $ended ]]; then
            wait "$trainer"
        elif [[ -n $gave_up ]] && ((SECONDS > deadline)); then
            say "the trainer did not stop within $GIVE_UP_SECONDS s; it is ended"
            return # its step ends with this script
        elif [[ -z $deadline ]] && ! kill -0 "$engines" 2>/dev/null; then
            # Where one node had given up before, the step's status is its.
            if wait "$engines" || [[ -e $KLEAR_ENGINE_REQUESTS/told_to_end ]]; then
                # However long a step and a save take: how much time there is Slurm alone knows.
                deadline=never
                say "Slurm told the engines to end, as it does before a preemption"
            else
                gave_up=1 deadline=$((SECONDS + GIVE_UP_SECONDS))
                say "no engine is left: all gave up; $(end_of_engines_log)" | tee -a "$logs/train-$job-$attempt.log"
            fi
            ask_trainer_to_stop "the trainer stops, and saves what it has"
        else
            sleep 2 &
            wait -n # for the sleep, the trainer, a signal: whatever comes first
        fi
    done
}

end_of_engines_log() {
    printf 'the end of %s:\n' "$engines_log"
    tail -n 15 "$engines_log" 2>/dev/null | sed 's/^/    /'
}

# wait_for PID: to its end; a trap that runs meanwhile ends bash's own wait early.
wait_for() {
    [[ -n $1 ]] || return 0
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
}

stop_engines() {
    [[ -n $engines ]] || return 0
    kill "$engines" 2>/dev/null
    wait_for "$engines"
}

# Ends the job with the trainer's own exit status, or sends it back to the queue.
finish() {
    local status=1
    if [[ -z $trainer ]]; then
        status=$RESUMABLE # told to stop before it had started
    elif [[ -s $status_file ]]; then
        status=$(<"$status_file")
    fi
    rm -f "$status_file" "$pid_file"
    [[ -z $engines ]] || rm -rf "$KLEAR_ENGINE_REQUESTS"
    if [[ -n $ended ]] && ((status == 1)); then
        say "Slurm ended the job; the run goes on from its last checkpoint when the job is started again"
        exit "$status"
    fi
    if [[ -n $gave_up ]] && ((status != 0)); then
        say "failed: the engines gave up, see $engines_log. Submitted again, it resumes from the last checkpoint"
        exit 1 # requeued, it would fail again
    fi
    [[ -z $engines_log ]] || ((status == 0 || status == RESUMABLE)) || say "if an engine is missing: $(end_of_engines_log)"
    case $status in
        0) say "done" ;;
        "$BAD_INPUT") say "the input was refused; see the log" ;;
        "$RESUMABLE") requeue ;;
        *) say "failed; see the log. Submitted again, it resumes from the last checkpoint" ;;
    esac
    exit "$status"
}

requeue() {
    if [[ -n $ended ]]; then
        say "stopped and saved; Slurm ended the job (cancelled, or requeued by Slurm itself)"
    elif ((attempt >= max_restarts)); then
        say "stopped and saved, but restarted $attempt times already (KLEAR_MAX_RESTARTS); submit it again to go on"
    elif scontrol requeue "$job"; then
        say "stopped and saved; requeued to go on"
    else
        say "stopped and saved, but it cannot be requeued here; submit it again to go on"
    fi
}
