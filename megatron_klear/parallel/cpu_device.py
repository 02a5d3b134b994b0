"""Lets the unmodified Megatron-Core run on a machine without CUDA, over gloo.

Megatron-Core names the CUDA device in many places: it allocates on `torch.cuda.current_device()`, passes
`device="cuda"`, forks CUDA random states and checks that parameters are `torch.cuda.FloatTensor`. None of
that is essential to what it computes. This file is the whole of what stands between: nothing else in the
project patches torch or Megatron.

`install()` replaces a few `torch.cuda` functions by CPU ones (only where CUDA is absent) and
`cuda_means_cpu()` is a context in which the word "cuda" in a torch call means the CPU. On a machine with
CUDA both do nothing, so callers need no branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_installed = False


def cuda_is_absent() -> bool:
    """Whether this process has no CUDA device and so uses the CPU in its place."""
    return not torch.cuda.is_available()


def install() -> None:
    """Replace the `torch.cuda` calls that Megatron-Core makes by CPU ones, once, where CUDA is absent."""
    global _installed
    if _installed or not cuda_is_absent():
        return
    _installed = True
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]

    from megatron.core.tensor_parallel import random as megatron_random

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    megatron_random._set_cuda_rng_state = set_state
    megatron_random._get_cuda_rng_state = get_state


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` to the CPU and reports CUDA tensor types, so that type checks pass."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Context for calls into Megatron-Core that name the CUDA device; does nothing where CUDA is present."""
    if not cuda_is_absent():
        yield
        return
    with _CudaMeansCpu():
        yield
