#!/usr/bin/env bash
# Makes the Python environment that everything here runs in; does nothing when it is already there and up to date.
#
#   KLEAR_VENV=DIR             where it lives (default: .venv in this repository)
#   KLEAR_PYTHON=PROGRAM       which Python 3.11 or 3.12 to use (default: the first one found that works)
#   KLEAR_SYSTEM_PACKAGES=1    see the machine's own packages and keep its torch: for GPU images that bring
#                              torch, Transformer Engine and flash-attn
#   KLEAR_EXTRAS=LIST          extras of setup.py to install (default: dev)
#
# Packages come from wherever your pip is configured to look, in the versions of constraints.txt. On Linux pip's default
# torch carries CUDA, several GB of it; on a machine without a GPU, configuring pip (PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL) to find torch's CPU build saves most of the download: such a build is preferred when pip sees it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KLEAR_VENV:-$root/.venv}
extras=${KLEAR_EXTRAS:-dev}
system=${KLEAR_SYSTEM_PACKAGES:-0}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

speaker=set-up
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

fingerprint() {
    {
        cat "$root/setup.py" "$root/constraints.txt" "${BASH_SOURCE[0]}" "$root/tools/environment.sh"
        echo "$root $extras $system"
        "$venv/bin/python" -c 'import sys; print(sys.version)'
    } 2>/dev/null | digest
}

hold_directory KLEAR_VENV
if up_to_date; then
    say "$venv is up to date"
    exit 0
fi

if [[ -f $state && ($(<"$state") == installing || ! -x $venv/bin/python) ]]; then
    say "an earlier set-up of $venv did not finish; starting over"
    empty_directory
fi

say "making the environment in $venv (takes minutes, once)"
fresh=0
[[ -x $venv/bin/python ]] || fresh=1
echo installing >"$state"
: >"$log"

if ((fresh)); then
    python=$(find_python)
    flags=()
    [[ $system == 1 ]] && flags+=(--system-site-packages)
    step "1/5 virtual environment with $("$python" --version) ($python)" "$python" -m venv ${flags[@]+"${flags[@]}"} "$venv"
else
    say "1/5 virtual environment: there already"
fi

constraints=$root/constraints.txt
if [[ $system == 1 ]]; then
    # What the image compiled against its own torch must stay as it is.
    constraints=$venv/constraints.txt
    grep -viE '^(torch|triton|numpy|transformer-engine[a-z0-9-]*|flash-attn|nvidia-[a-z0-9-]+)==' "$root/constraints.txt" >"$constraints"
    "$venv/bin/python" -c 'import torch' 2>>"$log" ||
        fail "KLEAR_SYSTEM_PACKAGES=1, but $venv/bin/python cannot import the machine's torch (see $log)"
fi

step "2/5 torch (the largest part)" pip_install setuptools torch
step "3/5 Megatron-Core, transformers and the rest of the packages" \
    pip_install --no-build-isolation --editable "${root}[$extras]"
step "4/5 reasoning-gym (problems for the examples)" pip_install --no-deps reasoning-gym
if ! pip_install --no-deps pycosat >>"$log" 2>&1; then
    say "    without pycosat, which needs a C compiler; only logic puzzles that are not used here need it"
    # reasoning-gym imports it on start, so that something of its name must be there.
    "$venv/bin/python" - <<'PLACEHOLDER'
import pathlib, sysconfig

pathlib.Path(sysconfig.get_path("purelib"), "pycosat.py").write_text(
    """def __getattr__(name):
    raise AttributeError(f"pycosat.{name}: pycosat could not be built when this environment was set up")
"""
)
PLACEHOLDER
fi
step "5/5 checking that the packages fit together" "$venv/bin/python" -c \
    'import torch, megatron.core, transformers, math_verify, omegaconf, pydantic, reasoning_gym, megatron_klear, klear_kernels'

fingerprint >"$state"
say "done in $SECONDS s: $("$venv/bin/python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, " + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"))')"
