"""Which backend computes an operation: chosen by what is there, or by the caller.

A backend is a module `klear_kernels.<operation>.<name>_backend`. To add one, write that module with the
functions that the operation's `function.py` calls, and list it here before the ones it should be preferred to.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_BACKENDS: dict[str, tuple[str, ...]] = {"linear_logprob": ("torch",), "linear_policy_loss": ("torch",)}


def available_backends(operation: str, device: torch.device) -> tuple[str, ...]:
    """Backends of an operation that work on `device`, the preferred one first."""
    del device  # the chunked torch backend runs everywhere
    return _BACKENDS[operation]


def choose_backend(operation: str, requested: str | None, device: torch.device) -> str:
    """Return `requested` if it can run on `device`, the preferred backend if None.

    Raises:
        ValueError: no such backend, or not on this device.
    """
    available = available_backends(operation, device)
    if requested is None:
        return available[0]
    if requested not in available:
        raise ValueError(f"backend: got {requested!r}, allowed on {device.type}: {', '.join(available)}, or None")
    return requested


def load_backend(operation: str, name: str) -> ModuleType:
    """Import a backend's module."""
    return importlib.import_module(f"klear_kernels.{operation}.{name}_backend")
