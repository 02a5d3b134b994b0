"""Named ranges in the timelines of profilers: NVIDIA's, and torch's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def cuda_in_use() -> bool:
    """Whether this process has loaded torch and started CUDA; never starts it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


class OpenRange:
    """A range that is open since it was made, until `close`.

    It may be closed where no `with` block reaches, for instance in a hook of autograd, but on the thread that opened
    it. Ranges of a thread must be closed in the reverse order of opening.

    Args:
        name: as it shall stand in the timeline.
    """

    __slots__ = ("_nvtx", "_recorded")

    def __init__(self, name: str) -> None:
        torch = sys.modules.get("torch")
        self._recorded: Any = None
        self._nvtx = cuda_in_use()
        if torch is not None and torch.autograd._profiler_enabled():
            self._recorded = torch.profiler.record_function(name)
            self._recorded.__enter__()
        if torch is not None and self._nvtx:
            torch.cuda.nvtx.range_push(name)

    def close(self) -> None:
        """Ends the range; a second call does nothing."""
        if self._nvtx:
            sys.modules["torch"].cuda.nvtx.range_pop()
        if self._recorded is not None:
            self._recorded.__exit__(None, None, None)
        self._nvtx, self._recorded = False, None


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """Marks what runs inside as `name`; does nothing where CUDA is not in use and torch's profiler does not record."""
    opened = OpenRange(name)
    try:
        yield
    finally:
        opened.close()
