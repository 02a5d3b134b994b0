"""Whether another process on this machine can open handles of a GPU's memory; some containers forbid it."""

from __future__ import annotations

import subprocess
import sys

import torch

from megatron_klear.weight_sync.sharing import serialized_here

_SECONDS = 300.0
_VALUE = 123
_OPEN = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
rebuild = reductions.rebuild_cuda_tensor
def by_uuid(*given):
    number = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())].index(given[6])
    return rebuild(*given[:6], number, *given[7:])
reductions.rebuild_cuda_tensor = by_uuid
print(int(pickle.loads(base64.b64decode(sys.stdin.read()))["flattened_tensor"].sum()))
"""
"""A process that opens a handle as SGLang does: in a process of our own, since a server that cannot ends itself."""


def why_not_shared(device: torch.device) -> str:
    """Why no other process can open handles of this GPU's memory; empty when one can.

    Args:
        device: a CUDA device.
    """
    sample = torch.full((1,), _VALUE, dtype=torch.uint8, device=device)
    try:
        text = serialized_here({"flattened_tensor": sample})
    except RuntimeError as error:
        return f"no handle of {device}'s memory: {str(error).splitlines()[0]}"
    try:
        opened = subprocess.run(
            [sys.executable, "-c", _OPEN], input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no process to open a handle of {device}'s memory: {error}"
    if opened.returncode == 0 and opened.stdout.strip() == str(_VALUE):
        return ""
    reason = opened.stderr.strip().splitlines() or [f"it read {opened.stdout.strip()!r}"]
    return f"another process cannot open a handle of {device}'s memory: {reason[-1]}"
