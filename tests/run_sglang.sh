#!/usr/bin/env bash
# Sets up (once) the trainer's and SGLang's environments, and runs the tests that need a real SGLang server. They take
# 22 to 33 minutes on two cores. Arguments go to pytest. tests/run.sh runs these tests too where SGLang's environment
# is there, and skips them, saying so, where it is not. `--files` only names them.
#
#   KLEAR_SGLANG_VENV=DIR        environment of the tests on a CPU, which is made for a CPU whatever it was made for
#                                before (default: .venv-sglang, where there is a GPU .venv-sglang-cpu)
#   KLEAR_SGLANG_CUDA_VENV=DIR   another, for the tests marked gpu; used where nvidia-smi lists a GPU (default:
#                                .venv-sglang, as tools/setup_sglang.sh makes it there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
tests=(
    tests/rollout/sglang tests/weight_sync tests/e2e/test_sglang.py tests/e2e/test_colocated.py
    tests/e2e/test_sglang_fixed_order.py tests/e2e/test_sglang_machines.py tests/e2e/test_sglang_others.py
    tests/e2e/test_sglang_broadcast.py tests/e2e/test_sglang_lost_at_start.py tests/e2e/test_sglang_routed.py
    tests/e2e/test_mismatch_causes.py tests/session/test_left_out.py tests/slurm/test_sglang.py
)
if [[ ${1:-} == --files ]]; then
    printf '%s\n' "${tests[@]}"
    exit 0
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

has_gpu=false
[[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]] && has_gpu=true
cuda=${KLEAR_SGLANG_CUDA_VENV:-$root/.venv-sglang}
if $has_gpu; then default=$root/.venv-sglang-cpu; else default=$root/.venv-sglang; fi
export KLEAR_SGLANG_VENV=${KLEAR_SGLANG_VENV:-$default}
if $has_gpu && [[ $(realpath -m "$KLEAR_SGLANG_VENV") == "$(realpath -m "$cuda")" ]]; then
    echo "KLEAR_SGLANG_VENV and KLEAR_SGLANG_CUDA_VENV are both $cuda; a CPU and a GPU need one each" >&2
    exit 2
fi

bash tools/setup_env.sh
KLEAR_SGLANG_DEVICE=cpu bash tools/setup_sglang.sh
bash tests/slurm/cluster.sh install || echo "tests/slurm will be skipped"
bash tests/reward/bubblewrap.sh || echo "the tests that need a sandbox will be skipped"
python=${KLEAR_VENV:-$root/.venv}/bin/python
status=0
# A run of their own, with SGLang's own kernels; the servers of all other tests compute on the CPU, GPU or not.
if $has_gpu; then
    if KLEAR_SGLANG_VENV=$cuda KLEAR_SGLANG_DEVICE=cuda bash tools/setup_sglang.sh; then
        gpu=0
        KLEAR_SGLANG_VENV=$cuda "$python" -m pytest -m gpu tests/e2e/test_colocated_gpu.py \
            tests/rollout/sglang/test_repeatable.py "$@" || gpu=$?
        ((gpu == 0 || gpu == 5)) || status=$gpu # 5: none among those that were asked for
    else
        status=1
    fi
fi
# Last, so that its own summary closes the output.
"$python" -m pytest "${tests[@]}" \
    --durations=60 --durations-min=4 "$@" || status=$?
if ((status)); then echo "tests/run_sglang.sh: FAILED" >&2; fi
exit "$status"
