"""Which backend computes an operation: chosen by what is there, or by the caller.

A backend is a module `klear_kernels.<operation>.<name>_backend`. To add one, write that module with the
functions that the operation's `function.py` calls, and give it a line in `_BACKENDS`, with the question that
says why it cannot run on a device with a dtype.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch

from klear_kernels import cuda_extension

Refusal = Callable[[torch.device, torch.dtype], str | None]
"""Says why a backend cannot run on a device with inputs of a dtype; None where it can."""


def _torch_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    del device, dtype  # runs everywhere
    return None


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"it multiplies bfloat16, the inputs are {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "it is made for NVIDIA devices"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:  # tile sizes are chosen for its shared memory and matrix instruction, and checked only there
            return f"its tiles are made for compute capability 9.0, the device has {major}.{minor}"
    elif device.type != "cpu" or not interpreting_triton():
        return f"it runs on cuda devices, the inputs are on {device.type}"
    return _triton_import_error()


def _cuda_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"it multiplies bfloat16, the inputs are {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"it runs on cuda devices, the inputs are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it is compiled for compute capability 9.0, the device has {major}.{minor}"
    return cuda_extension.import_error()


def interpreting_triton() -> bool:
    """Whether triton kernels are interpreted, on CPU tensors; slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("triton")
        importlib.import_module("triton.tools.tensor_descriptor")  # older releases lack it
    except Exception as error:  # a broken installation fails in many ways; the torch backend then serves
        return f"triton cannot be imported ({error})"
    return None


_BACKENDS: dict[str, dict[str, Refusal]] = {
    "linear_logprob": {"triton": _triton_refusal, "cuda": _cuda_refusal, "torch": _torch_refusal},
    "linear_policy_loss": {"triton": _triton_refusal, "cuda": _cuda_refusal, "torch": _torch_refusal},
}
"""The preferred one first; on a CPU, where only the interpreter runs others, torch always is."""


def backend_names(operation: str) -> tuple[str, ...]:
    """Every backend of an operation, whether it can run here or not, the preferred one first."""
    return tuple(_BACKENDS[operation])


def backend_refusal(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend of an operation cannot run on `device` with `dtype` inputs, None where it can."""
    return _BACKENDS[operation][name](device, dtype)


def available_backends(operation: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends of an operation that work on `device` with `dtype` inputs, the preferred one first."""
    names = [name for name in _BACKENDS[operation] if backend_refusal(operation, name, device, dtype) is None]
    if device.type == "cpu":
        names.sort(key=lambda name: name != "torch")
    return tuple(names)


def choose_backend(operation: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return `requested` if it can run on `device` with `dtype` inputs, the preferred backend if None.

    Raises:
        ValueError: no such backend, or it cannot run here.
    """
    if requested is None:
        return available_backends(operation, device, dtype)[0]
    known = requested in _BACKENDS[operation]
    refusal = backend_refusal(operation, requested, device, dtype) if known else None
    if known and refusal is None:
        return requested
    allowed = f"allowed on {device.type}: {', '.join(available_backends(operation, device, dtype))}, or None"
    raise ValueError(f"backend: got {requested!r}, {allowed}" + (f"; {refusal}" if refusal else ""))


def load_backend(operation: str, name: str) -> ModuleType:
    """Import a backend's module."""
    return importlib.import_module(f"klear_kernels.{operation}.{name}_backend")
