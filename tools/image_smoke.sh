#!/usr/bin/env bash
# Says whether the image of the Dockerfile holds what it should; the last step of its build runs this.
#
#   bash tools/image_smoke.sh          the user, versions, imports, SGLang's environment, bubblewrap, equations on the CPU
#   bash tools/image_smoke.sh --gpu    the same, then Transformer Engine, apex and the layouts on the GPUs that are seen
#
# exit status: 0 all is well, 1 something is not; what, stands in the last lines
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
python=${KLEAR_VENV:-$PWD/.venv}/bin/python
sglang=${KLEAR_SGLANG_VENV:-$PWD/.venv-sglang}/bin/python

say() { echo "smoke: $*"; }

say "user $(id -un)"
[[ $(id -u) != 0 ]] || { say "runs as root; it should run as klear" && exit 1; }

say "versions"
"$python" - <<'PINNED'
import importlib.metadata as metadata
import re
import sys

pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", open("constraints.txt").read(), re.MULTILINE))
wrong = []
for name in ("megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn", "nvidia-dali-cuda130",
             "transformers", "torch"):
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = "none"
    print(f"  {name} {found}")
    # The image's torch is a build before the release, such as 2.13.0a0+8145d630e8.
    if not (found == pins[name] or (name == "torch" and found.startswith(pins[name]))):
        wrong.append(f"{name} is {found}, constraints.txt says {pins[name]}")
print(f"  apex {metadata.version('apex')}")
sys.exit("\n".join(wrong) or None)
PINNED

say "imports"
"$python" -c 'import torch, megatron.core, flash_attn, nvidia.dali, megatron_klear, klear_kernels'
"$sglang" -c 'import sglang.launch_server, importlib.metadata as m; print("  sglang", m.version("sglang"))'
bwrap --version

say "equations"
CUDA_VISIBLE_DEVICES='' "$python" -m megatron_klear.verify --device cpu --equations-only

if [[ ${1:-} == --gpu ]]; then
    say "GPUs"
    "$python" -c 'import torch; print(" ", torch.cuda.get_device_name())'
    "$python" -c 'import transformer_engine.pytorch, apex, amp_C, klear_kernels._cuda'
    "$python" -m megatron_klear.verify --layouts-only
    "$python" -m pytest -q -m gpu tests
fi
say "done"
