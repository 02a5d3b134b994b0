#!/usr/bin/env bash
# The engines of one node, as a task of the job step that tools/slurm_job.sh starts:
#   slurm_engines.sh COUNT TP PORT COMMAND...     COUNT servers of TP GPUs each, listening on PORT, PORT + 1, ...
# A server that ends is started again, KLEAR_ENGINE_RESTARTS times at most before it has served for ten minutes: the
# trainer generates and publishes meanwhile with the others, and sends it the weights of the last publish when it
# answers again (weight_sync.keep_on_disk). When one ends in the middle of a broadcast
# (weight_sync.transport=distributed), the others are sent the weights again. One that hangs is ended when the trainer
# asks for it by a file ADDRESS_PORT in KLEAR_ENGINE_REQUESTS (sglang.restart_requests), and one that does not listen
# KLEAR_ENGINE_SECONDS after its start by itself.
# What no restart mends, a command that is not there or a port that others keep, ends them before they have begun.
# SIGTERM ends them all, with status 0: told to end, they have not given up. A file told_to_end in KLEAR_ENGINE_REQUESTS
# says so for all nodes, also where one has given up before.
set -uo pipefail
count=$1 tp=$2 port=$3
shift 3
restarts=${KLEAR_ENGINE_RESTARTS:-10}
start_seconds=${KLEAR_ENGINE_SECONDS:-1800}
readonly WELL_SECONDS=600 # of serving, after which a server's earlier ends are not held against it
readonly END_SECONDS=5    # that a server gets to end by itself

refuse() {
    echo "$1 on ${SLURMD_NODENAME:-this node}: $2"
    exit 2
}

# listens PORT: whether anybody does.
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Ports of an earlier start of the job may take a moment to be free.
require_free() {
    local attempt
    for ((attempt = 0; attempt < 10; attempt++)); do
        listens "$1" || return 0
        sleep 2
    done
    refuse KLEAR_ENGINE_PORT "port $1 is in use, by another job or an engine that was left behind; choose another"
}

# end_group PID: a server and all processes that it started, which would keep its port and its GPUs.
end_group() {
    local deadline=$((SECONDS + END_SECONDS))
    kill -TERM -- "-$1" 2>/dev/null || return 0
    while kill -0 -- "-$1" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$1" 2>/dev/null
}

# shellcheck disable=SC2317 # traps call it
note_told_to_end() {
    [[ -z ${KLEAR_ENGINE_REQUESTS:-} ]] || touch "$KLEAR_ENGINE_REQUESTS/told_to_end" 2>/dev/null
}

# serve INDEX COMMAND...: one server and its restarts.
serve() {
    local index=$1 left=$restarts server='' began started status place=() name request=''
    shift
    name="engine of port $((port + index)) on ${SLURMD_NODENAME:-this node}"
    [[ -z ${KLEAR_ENGINE_REQUESTS:-} ]] || request=$KLEAR_ENGINE_REQUESTS/${address}_$((port + index))
    trap 'note_told_to_end; [[ -z $server ]] || end_group "$server"; exit 0' TERM
    # Without GPUs the variable must stay unset.
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] ||
        place=("CUDA_VISIBLE_DEVICES=$(seq -s, $((index * tp)) $((index * tp + tp - 1)))")
    while :; do
        began='' started=$SECONDS
        [[ -z $request ]] || rm -f "$request" # it can only mean a server before this one
        # A session of its own makes it the leader of a group of processes.
        setsid env "${place[@]}" "$@" --tp-size "$tp" --host 0.0.0.0 --port $((port + index)) &
        server=$!
        while kill -0 "$server" 2>/dev/null; do
            [[ -n $began ]] || ! listens $((port + index)) || began=$SECONDS
            if [[ -n $request && -e $request ]]; then
                echo "$name is ended: the trainer asks for it"
                end_group "$server"
            elif [[ -z $began ]] && ((SECONDS - started > start_seconds)); then
                echo "$name is ended: it does not listen $start_seconds s after its start (KLEAR_ENGINE_SECONDS)"
                end_group "$server"
            fi
            sleep 1 &
            wait -n # for the sleep or the server
        done
        wait "$server"
        status=$?
        end_group "$server"
        [[ -z $request ]] || rm -f "$request"
        [[ -z $began ]] || ((SECONDS - began < WELL_SECONDS)) || left=$restarts
        echo "$name ended with status $status; $left restarts left"
        ((left-- > 0)) || exit 1
        sleep 5
    done
}

trap 'note_told_to_end; kill $(jobs -p) 2>/dev/null; wait; exit 0' TERM
[[ -x $(command -v "$1") ]] || refuse KLEAR_SGLANG_VENV "there is no $1 (tools/setup_sglang.sh makes it)"
# As the trainer knows this node; in lower case, as it reads the hosts of URLs.
address=''
for pair in ${KLEAR_ENGINE_ADDRESSES:-}; do [[ ${pair%%=*} != "${SLURMD_NODENAME:-}" ]] || address=${pair#*=}; done
address=${address,,}
for ((index = 0; index < count; index++)); do require_free $((port + index)); done
servers=()
for ((index = 0; index < count; index++)); do serve "$index" "$@" & servers+=("$!"); done
# Slurm's SIGTERM goes to every process, and may end those that serve before this shell has it.
status=0
for server in "${servers[@]}"; do wait "$server" || status=1; done
exit "$status" # 1 only when an engine gave up
