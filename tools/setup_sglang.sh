#!/usr/bin/env bash
# Makes the Python environment that SGLang's servers run in; does nothing when it is already there and up to date.
# It is an environment of its own, since SGLang pins other versions of torch and transformers than the trainer.
#
#   KLEAR_SGLANG_VENV=DIR      where it lives (default: .venv-sglang in this repository)
#   KLEAR_SGLANG_DEVICE=NAME   cpu, cuda, or auto (default): cuda where nvidia-smi lists a GPU
#   KLEAR_PYTHON=PROGRAM       which Python 3.11 or 3.12 to use (default: the first one found that works)
#
# Versions stand in constraints-sglang.txt. On a GPU SGLang brings its own torch and kernels (several GB). Without one it
# runs on torch alone: its kernel packages are CUDA only and are left out, and two small modules of tools/sglang_cpu take
# the place of what it cannot start without; a third, a plugin as SGLang defines them, makes its attention quicker there.
# Packages come from wherever your pip is configured to look; see tools/setup_env.sh on torch's CPU build.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KLEAR_SGLANG_VENV:-$root/.venv-sglang}
device=${KLEAR_SGLANG_DEVICE:-auto}
shims=$root/tools/sglang_cpu

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

speaker=sglang
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

case $device in
auto) if nvidia-smi --list-gpus 2>/dev/null | grep -q .; then device=cuda; else device=cpu; fi ;;
cpu | cuda) ;;
*) fail "KLEAR_SGLANG_DEVICE=$device must be cpu, cuda or auto" ;;
esac

fingerprint() {
    {
        cat "$root/constraints-sglang.txt" "$shims"/klear_sglang_*.py "$shims/sgl_kernel/__init__.py" \
            "${BASH_SOURCE[0]}" "$root/tools/environment.sh"
        echo "$device"
        "$venv/bin/python" -c 'import sys; print(sys.version)'
    } 2>/dev/null | digest
}

install_shims() {
    local packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/sgl_kernel"
    cp "$shims/sgl_kernel/__init__.py" "$packages/sgl_kernel/"
    cp "$shims/klear_sglang_cpu.py" "$shims/klear_sglang_plugin.py" "$packages/"
    echo "import klear_sglang_cpu" >"$packages/klear_sglang_cpu.pth"
    # SGLang finds its plugins by the entry points of installed packages.
    mkdir -p "$packages/klear_sglang_cpu-1.dist-info"
    printf 'Metadata-Version: 2.1\nName: klear_sglang_cpu\nVersion: 1\n' >"$packages/klear_sglang_cpu-1.dist-info/METADATA"
    printf '[sglang.srt.plugins]\nklear_cpu = klear_sglang_plugin:register\n' \
        >"$packages/klear_sglang_cpu-1.dist-info/entry_points.txt"
}

hold_directory KLEAR_SGLANG_VENV
if up_to_date; then
    say "$venv is up to date"
    exit 0
fi

# Unlike the trainer's environment this one is never edited by hand: anything out of date is made anew, so that no
# package of an older SGLang stays behind.
if [[ -f $state ]]; then
    say "$venv is unfinished or out of date; starting over"
    empty_directory
fi

say "making SGLang's environment for $device in $venv (takes minutes, once)"
echo installing >"$state"
: >"$log"

python=$(find_python)
step "1/4 virtual environment with $("$python" --version) ($python)" "$python" -m venv "$venv"

constraints=$venv/constraints.txt
packages=(
    IPython "anthropic>=0.20" aiohttp blobfile compressed-tensors datasets einops fastapi gguf interegular
    "llguidance<2" msgspec ninja numpy openai openai-harmony orjson outlines partial_json_parser pillow
    prometheus-client psutil py-spy pybase64 pydantic python-multipart pyzmq requests scipy sentencepiece setproctitle
    setuptools soundfile tiktoken tokenizers transformers uvicorn uvloop watchfiles xgrammar xxhash zstandard
)
if [[ $device == cpu ]]; then
    cp "$root/constraints-sglang.txt" "$constraints"
    step "2/4 torch (the largest part)" pip_install torch
    step "3/4 what SGLang imports" pip_install "${packages[@]}"
    # Their lists of dependencies name CUDA packages. No torchaudio: without CUDA it keeps transformers from loading.
    # The router (sglang.router_url) needs no more than is there.
    step "4/4 SGLang on torch alone" pip_install --no-deps sglang triton torchvision apache-tvm-ffi sglang-router
    install_shims
    export SGLANG_USE_CPU_ENGINE=1
else
    # SGLang names the torch and the kernels that a GPU needs; the file's versions of these are for a CPU.
    grep -viE '^(torch|triton|torchvision|apache-tvm-ffi|nvidia-[a-z0-9-]+)==' "$root/constraints-sglang.txt" >"$constraints"
    step "2/4 SGLang's version" pip_install --no-deps sglang
    step "3/4 torch, kernels and the rest (the largest part)" pip_install sglang sglang-router
    say "4/4 no shims: this environment has SGLang's own kernels"
fi
step "checking that the packages fit together" "$venv/bin/python" -c 'import torch, transformers, sglang.launch_server'

fingerprint >"$state"
say "done in $SECONDS s: $("$venv/bin/python" -c 'import importlib.metadata as m, sys; print("Python " + sys.version.split()[0] + ", sglang " + m.version("sglang") + ", torch " + m.version("torch"))')"
