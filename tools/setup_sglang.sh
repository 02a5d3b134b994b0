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
# the place of what it cannot start without. Packages come from wherever your pip is configured to look; see
# tools/setup_env.sh on torch's CPU build.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KLEAR_SGLANG_VENV:-$root/.venv-sglang}
device=${KLEAR_SGLANG_DEVICE:-auto}
shims=$root/tools/sglang_cpu
state=$venv/.klear-state # "installing", or the fingerprint of a finished set-up
log=$venv/setup.log
ticker=

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

say() { echo "sglang: $*"; }

fail() {
    echo "sglang: $*" >&2
    exit 1
}

case $device in
auto) if nvidia-smi --list-gpus 2>/dev/null | grep -q .; then device=cuda; else device=cpu; fi ;;
cpu | cuda) ;;
*) fail "KLEAR_SGLANG_DEVICE=$device must be cpu, cuda or auto" ;;
esac

usable() {
    # A shim on PATH may exist and not run; Debian's python3 may lack venv and pip.
    "$1" -c 'import sys, ssl, sqlite3, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${KLEAR_PYTHON:-} ]]; then
        usable "$KLEAR_PYTHON" || fail "KLEAR_PYTHON=$KLEAR_PYTHON is not a Python 3.11 or 3.12 with venv and pip"
        echo "$KLEAR_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python3 /usr/local/bin/python3.1[12] /usr/bin/python3.1[12]; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no working Python 3.11 or 3.12 (with the venv and ensurepip modules; on Debian: apt install python3-venv)." \
        "Install one, or name it in KLEAR_PYTHON."
}

fingerprint() {
    {
        cat "$root/constraints-sglang.txt" "$shims/klear_sglang_cpu.py" "$shims/sgl_kernel/__init__.py" "${BASH_SOURCE[0]}"
        echo "$device"
        "$venv/bin/python" -c 'import sys; print(sys.version)'
    } 2>/dev/null | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

stop_ticker() {
    if [[ -n $ticker ]]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        ticker=
    fi
}
trap stop_ticker EXIT

step() {
    local text=$1 start=$SECONDS
    shift
    say "$text"
    # A sleep left behind must hold neither the lock nor the output that a caller may be reading to its end.
    (while sleep 30 >/dev/null 2>&1; do echo "sglang:   ... $((SECONDS - start)) s"; done) 9>&- &
    ticker=$!
    if ! "$@" >>"$log" 2>&1; then
        stop_ticker
        tail -n 25 "$log" >&2
        fail "this step failed: $text (all of its output: $log)"
    fi
    stop_ticker
}

pip_install() { "$venv/bin/python" -m pip install --no-input --disable-pip-version-check -c "$constraints" "$@"; }

install_shims() {
    local packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/sgl_kernel"
    cp "$shims/sgl_kernel/__init__.py" "$packages/sgl_kernel/"
    cp "$shims/klear_sglang_cpu.py" "$packages/"
    echo "import klear_sglang_cpu" >"$packages/klear_sglang_cpu.pth"
}

mkdir -p "$venv"
if [[ ! -f $venv/pyvenv.cfg && ! -f $state && -n $(find "$venv" -mindepth 1 ! -name .klear-lock -print -quit) ]]; then
    fail "$venv holds something that is no virtual environment; remove it or set KLEAR_SGLANG_VENV"
fi
# Two commands started together: the second waits for the first.
if command -v flock >/dev/null; then
    exec 9>"$venv/.klear-lock"
    flock --nonblock 9 || { say "waiting for another set-up of $venv"; flock 9; }
fi

if [[ -f $state && -x $venv/bin/python && $(<"$state") == "$(fingerprint)" ]]; then
    say "$venv is up to date"
    exit 0
fi

# Unlike the trainer's environment this one is never edited by hand: anything out of date is made anew, so that no
# package of an older SGLang stays behind.
if [[ -f $state ]]; then
    say "$venv is unfinished or out of date; starting over"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .klear-lock -exec rm -rf {} +
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
    step "4/4 SGLang on torch alone" pip_install --no-deps sglang triton torchvision apache-tvm-ffi
    install_shims
    export SGLANG_USE_CPU_ENGINE=1
else
    # SGLang names the torch and the kernels that a GPU needs; the file's versions of these are for a CPU.
    grep -viE '^(torch|triton|torchvision|apache-tvm-ffi|nvidia-[a-z0-9-]+)==' "$root/constraints-sglang.txt" >"$constraints"
    step "2/4 SGLang's version" pip_install --no-deps sglang
    step "3/4 torch, kernels and the rest (the largest part)" pip_install sglang
    say "4/4 no shims: this environment has SGLang's own kernels"
fi
step "checking that the packages fit together" "$venv/bin/python" -c 'import torch, transformers, sglang.launch_server'

fingerprint >"$state"
say "done in $SECONDS s: $("$venv/bin/python" -c 'import importlib.metadata as m, sys; print("Python " + sys.version.split()[0] + ", sglang " + m.version("sglang") + ", torch " + m.version("torch"))')"
