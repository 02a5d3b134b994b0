#!/usr/bin/env bash
# Sets up (once) and runs every check and test. Arguments go to pytest: bash tests/run.sh tests/packing -k zigzag
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

# Tests start several processes of their own; more threads in each would only make them wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

bash tools/setup_env.sh || exit
bin=${KLEAR_VENV:-$root/.venv}/bin
# The tests of the Slurm jobs start a Slurm of their own. Where it is not installed and cannot be, they are skipped.
if (($# == 0)) || [[ $* == *slurm* ]]; then
    bash tests/slurm/cluster.sh install || echo "tests/slurm will be skipped"
fi
# The code reward runs programs in bubblewrap. Where it is not installed and cannot be, the tests that need it are skipped.
bash tests/reward/bubblewrap.sh || echo "the tests of the code sandbox will be skipped"
# Tests start many processes that read all of the source, compiled or not.
"$bin/python" -m compileall -q megatron_klear kernels tests
failed=()

# All checks run even when one fails, so that one run shows everything there is to mend.
check() {
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        echo "== $name: passed ($((SECONDS - start)) s)"
    else
        echo "== $name: FAILED ($((SECONDS - start)) s)"
        failed+=("$name")
    fi
}

check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check --quiet .
check "mypy" "$bin/mypy"
check "Dockerfile" "$bin/hadolint" --config .hadolint.yaml Dockerfile
check "import directions" env PYTHONPATH=kernels "$bin/lint-imports" --no-logo
# Tests on GPUs are a run of their own: in the other one GPUs are hidden (tests/conftest.py).
if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
    "$bin/python" -m pytest -m gpu "$@"
    status=$?
    ((status == 0 || status == 5)) || failed+=("pytest -m gpu")  # 5: none among those that were asked for
fi
# Last, so that its own summary closes the output.
"$bin/python" -m pytest --durations=60 --durations-min=4 "$@" || failed+=("pytest")

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
