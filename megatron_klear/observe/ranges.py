"""Named ranges in the timeline of NVIDIA's profilers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def cuda_in_use() -> bool:
    """Whether this process has loaded torch and started CUDA; never starts it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Marks what runs inside as `name` in Nsight's timeline; does nothing where CUDA is not in use."""
    if not cuda_in_use():
        yield
        return
    nvtx = sys.modules["torch"].cuda.nvtx
    nvtx.range_push(name)
    try:
        yield
    finally:
        nvtx.range_pop()
