#!/usr/bin/env bash
# Submits the 8B recipe to Slurm as a chain of three jobs: fine-tuning, math RL, code RL. Each starts when the one before
# has ended well, from its last checkpoint. From the root of the repository:
#
#   bash examples/qwen3_8b/run.sh 8|64|256 [--check] [SBATCH OPTIONS]
#
# --check makes the plan of each job, submits nothing, and leaves: 0 all fit, 2 one does not. It needs neither model nor
# data nor a GPU. Without it the same is done first, and a job that does not fit is not submitted, nor are the others.
#
# Variables:
#   KLEAR_MODEL   Hugging Face directory of Qwen3-8B-Base (models/Qwen3-8B-Base)
#   KLEAR_DATA    where sft.jsonl, math.jsonl and code.jsonl are (data)
#   KLEAR_RUNS    where runs are kept (runs); all nodes must see it
# and those of tools/sft.slurm and tools/gppo.slurm. sbatch hands them on to the jobs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/qwen3_8b

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$here/run.sh"
    exit "$1"
}

# On GPUS devices in all: nodes of 8, how many of them serve, ranks per node, ranks that train with RL.
case ${1:-} in
8) nodes=1 engine_nodes=0 rl_ranks_per_node=4 rl_ranks=4 ;;
64) nodes=8 engine_nodes=4 rl_ranks_per_node=8 rl_ranks=32 ;;
256) nodes=32 engine_nodes=16 rl_ranks_per_node=8 rl_ranks=128 ;;
-h | --help) usage 0 ;;
*) usage 2 >&2 ;;
esac
gpus=$1
shift
check=
if [[ ${1:-} == --check ]]; then
    check=1
    shift
fi

sft=("$here/sft.yaml" "$here/layouts/sft-$gpus.yaml")
math=("$here/math.yaml" "$here/layouts/rl-$gpus.yaml")
code=("$here/code.yaml" "$here/layouts/rl-$gpus.yaml")

python=${KLEAR_VENV:-$PWD/.venv}/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
plan() { # plan RANKS FILES...
    echo "== ${2##*/}"
    "$python" -m megatron_klear.plan "${@:2}" --gpus "$1" --gpu h100 || exit 2
}
plan "$gpus" "${sft[@]}"
plan "$rl_ranks" "${math[@]}"
plan "$rl_ranks" "${code[@]}"
[[ -z $check ]] || exit 0

# after JOB: a job that cannot start any more, since JOB failed, is cancelled.
after() { printf '%s\n' "--dependency=afterok:$1" --kill-on-invalid-dep=yes; }
export KLEAR_ENGINE_NODES=$engine_nodes
# Seconds before the time limit at which Slurm warns a job: the longest step (by plan 8 minutes, of math on 8 GPUs), and
# a save of 115 GB that two ranks write and read back, at 0.1 GB/s each. What a job that is warned too
# late has done since its last checkpoint is lost, and the jobs behind it are cancelled.
lead=1800
submit() { # submit SCRIPT RANKS_PER_NODE [OPTIONS...] -- FILES...
    local script=$1 options=()
    export KLEAR_RANKS_PER_NODE=$2
    shift 2
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    sbatch --parsable --nodes="$nodes" --gpus-per-node=8 --signal=B:USR1@"$lead" "${options[@]}" "$script" "$@"
}
first=$(KLEAR_ENGINE_NODES=0 submit tools/sft.slurm 8 "$@" -- "${sft[@]}")
mapfile -t dependency < <(after "${first%%;*}")
second=$(submit tools/gppo.slurm "$rl_ranks_per_node" "$@" "${dependency[@]}" -- "${math[@]}")
mapfile -t dependency < <(after "${second%%;*}")
third=$(submit tools/gppo.slurm "$rl_ranks_per_node" "$@" "${dependency[@]}" -- "${code[@]}")
printf 'submitted: fine-tuning %s, math %s, code %s; runs in %s/qwen3-8b\n' \
    "${first%%;*}" "${second%%;*}" "${third%%;*}" "${KLEAR_RUNS:-runs}"
