#!/usr/bin/env bash
# Watch a small Qwen3 learn on this machine: sets up, makes problems, fine-tunes on worked solutions, then improves the
# model with GPPO, all with Megatron-Core in two processes. Takes about ten minutes on two cores once set up.
#
#   bash examples/quickstart.sh [SEED [DIR]]        seed 1 and runs/quickstart by default; another seed needs another DIR
#
# Started again after an interruption, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' examples/quickstart.sh
    exit 0
fi
seed=${1:-1}
run=${2:-runs/quickstart}
if (($# > 2)) || [[ ! $seed =~ ^[0-9]{1,4}$ ]]; then
    echo "quickstart: got '$*', expected [SEED [DIR]] with a SEED from 0 to 1999; --help says more" >&2
    exit 2
fi
before=$(cat "$run/data/done" 2>/dev/null || true)
if [[ -n $before && $before != "$seed" ]]; then
    echo "quickstart: $run was begun with seed $before, not $seed; name another directory: bash examples/quickstart.sh $seed DIR" >&2
    exit 2
fi

# One thread for each of the two processes.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

bash tools/setup_env.sh
export PATH=${KLEAR_VENV:-$root/.venv}/bin:$PATH

say() { echo "quickstart: $*"; }

# Two processes on CPUs; on a machine with a GPU, as many as there are GPUs but no more than two.
ranks=$(python -c 'import torch; print(max(1, min(2, torch.cuda.device_count())) if torch.cuda.is_available() else 2)')

train() {
    local entry=$1 config=$2
    shift 2
    torchrun --standalone --nproc-per-node "$ranks" -m "megatron_klear.$entry" "$config" "run.seed=$seed" "$@"
}

if [[ ! -f $run/data/done ]]; then
    say "1/3 making problems and their worked solutions in $run/data"
    python examples/quickstart_data.py --out "$run/data" --seed "$seed"
    echo "$seed" >"$run/data/done"
fi

say "2/3 supervised fine-tuning (Eq. 8), $ranks processes"
train train_sft examples/quickstart_sft.yaml "run.dir=$run/sft" "data.sft=[$run/data/sft.jsonl]" \
    "data.heldout=[$run/data/heldout.jsonl]" "tokenizer.dir=$run/data/tokenizer"

say "3/3 reinforcement learning with GPPO (Eq. 11), $ranks processes"
train train_rl examples/quickstart_rl.yaml "run.dir=$run/rl" "data.prompts=[$run/data/prompts.jsonl]" \
    "data.heldout=[$run/data/heldout.jsonl]" "tokenizer.dir=$run/data/tokenizer" "checkpoint.start_from=$run/sft"

say "curves and responses to read: $run/sft/report.html $run/rl/report.html"
python examples/quickstart_result.py "$run"
