#!/usr/bin/env bash
# Runs Nsight Compute on one configuration of the fused head and says, kernel by kernel, how fast it is and what limits it.
#
#   tools/profile_kernels.sh [BACKEND] [OPERATION] [TOKENS] [WORDS] [HIDDEN_SIZE]
#
#   BACKEND    torch, triton or cuda (default triton)
#   OPERATION  logprob, policy or lm (default policy)
#   sizes      default 8192 tokens, 151936 words, hidden size 4096
#
# ncu's own output is kept in KLEAR_PROFILE_OUT (default profile_kernels.csv in the current directory).
# Exit status: 0 done; 2 ncu, a GPU or the backend is missing, or an argument is wrong; 1 the profiled run failed.
set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
python=${KLEAR_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}

refuse() {
    echo "profile: $*" >&2
    exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
backend=${1:-triton} operation=${2:-policy} tokens=${3:-8192} words=${4:-151936} hidden_size=${5:-4096}
out=${KLEAR_PROFILE_OUT:-profile_kernels.csv}

[[ $backend =~ ^(torch|triton|cuda)$ ]] || refuse "backend: got $backend, allowed torch, triton, cuda"
[[ $operation =~ ^(logprob|policy|lm)$ ]] || refuse "operation: got $operation, allowed logprob, policy, lm"
for number in "$tokens" "$words" "$hidden_size"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "sizes: got $number, allowed whole numbers above 0"
done
command -v ncu >/dev/null || refuse "ncu is not on PATH. Install Nsight Compute: it comes with the CUDA toolkit" \
    "(package cuda-nsight-compute-13-0 of NVIDIA's repository); then put its folder on PATH."
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || refuse "torch sees no GPU"

metrics=$("$python" "$root/tools/ncu_limiter.py" --metrics)
status=0
# Warm-up runs outside the profiler's window; base units, so that numbers need no scaling.
ncu --csv --print-units base --profile-from-start off --target-processes all --metrics "$metrics" \
    "$python" -m klear_kernels.linear_policy_loss.benchmark --profile --only "klear $backend" \
    --operations "$operation" --tokens "$tokens" --words "$words" --hidden-size "$hidden_size" >"$out" || status=$?
if ((status)); then
    grep -E '^==(ERROR|WARNING)==' "$out" >&2 || tail -n 20 "$out" >&2
    if grep -q ERR_NVGPUCTRPERM "$out"; then
        refuse "this user may not read the GPU's counters: run as root, or load the driver with" \
            "NVreg_RestrictProfilingToAdminUsers=0."
    fi
    echo "profile: ncu ended with status $status" >&2
    exit 1
fi
echo "klear $backend, $operation, N $tokens, V $words, H $hidden_size (all of ncu's output: $out)"
"$python" "$root/tools/ncu_limiter.py" <"$out"
