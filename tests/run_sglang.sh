#!/usr/bin/env bash
# Sets up (once) the trainer's and SGLang's environments, and runs the tests that need a real SGLang server. They take
# 22 to 27 minutes on two cores. Arguments go to pytest. tests/run.sh runs these tests too where SGLang's environment
# is there, and skips them, saying so, where it is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

bash tools/setup_env.sh
bash tools/setup_sglang.sh
bash tests/slurm/cluster.sh install || echo "tests/slurm will be skipped"
exec "${KLEAR_VENV:-$root/.venv}/bin/python" -m pytest tests/rollout/sglang tests/weight_sync tests/e2e/test_sglang.py \
    tests/e2e/test_colocated.py tests/e2e/test_sglang_fixed_order.py tests/e2e/test_sglang_machines.py \
    tests/e2e/test_sglang_others.py tests/e2e/test_sglang_broadcast.py tests/e2e/test_sglang_lost_at_start.py \
    tests/e2e/test_mismatch_causes.py tests/session/test_left_out.py tests/slurm/test_sglang.py \
    --durations=15 --durations-min=2 "$@"
