"""The part of SGLang's CPU kernels that a dense model needs with torch-native attention, in plain torch.

SGLang's own CPU kernels want AMX and are not on the package index. Every name that is not here can be imported, as
SGLang imports many, and says so when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.0.0+klear.torch"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache places into its row: `req_to_token[row, start:end]`, in the order of requests."""
    lengths = (end_offset - start_offset).tolist()
    pieces = torch.split(out_cache_loc[: sum(lengths)], lengths)
    for row, start, places in zip(req_pool_indices.tolist(), start_offset.tolist(), pieces, strict=True):
        req_to_token[row, start : start + len(places)] = places.to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: this environment has SGLang's CPU kernels only in part")

    return absent
