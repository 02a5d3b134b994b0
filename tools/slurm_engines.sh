#!/usr/bin/env bash
# The engines of one node, as a task of the job step that tools/slurm_job.sh starts:
#   slurm_engines.sh COUNT TP PORT COMMAND...     COUNT servers of TP GPUs each, listening on PORT, PORT + 1, ...
# A server that ends is started again, KLEAR_ENGINE_RESTARTS times at most: the trainer generates meanwhile with the others,
# and the next publish brings its weights. A publish needs them all: one that falls into the restart ends the run, which
# can be resumed. SIGTERM ends them all.
set -uo pipefail
count=$1 tp=$2 port=$3
shift 3
restarts=${KLEAR_ENGINE_RESTARTS:-10}

# serve INDEX COMMAND...: one server and its restarts.
serve() {
    local index=$1 left=$restarts server='' place=()
    shift
    trap '[[ -z $server ]] || kill "$server" 2>/dev/null; exit 0' TERM
    # Without GPUs the variable must stay unset.
    [[ -z ${SLURM_GPUS_ON_NODE:-} ]] ||
        place=("CUDA_VISIBLE_DEVICES=$(seq -s, $((index * tp)) $((index * tp + tp - 1)))")
    while :; do
        env "${place[@]}" "$@" --tp-size "$tp" --host 0.0.0.0 --port $((port + index)) &
        server=$!
        wait "$server"
        echo "engine of port $((port + index)) on ${SLURMD_NODENAME:-this node} ended with status $?; $left restarts left"
        ((left-- > 0)) || exit 1
        sleep 5
    done
}

trap 'kill $(jobs -p) 2>/dev/null; wait; exit 0' TERM
for ((index = 0; index < count; index++)); do serve "$index" "$@" & done
wait
exit 1 # only when every engine gave up
