"""Ranks that call together must call alike: compared once per process group, before its first exchange.

A disagreement would otherwise show as a hang or, worse, as wrong numbers. Every call of a group is the same one on
all its ranks, so all of them come here on their first, and none waits for another in vain, not even where one rank
has refused its own input. Later calls are not compared: that would cost an exchange of Python objects per microbatch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_compared: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


@contextmanager
def same_on_all_ranks(group: dist.ProcessGroup | None, description: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Run a block of checks; on a group's first time, let all ranks learn what the others found and were given.

    Args:
        group: process group whose ranks call together, or None for a single process.
        description: what must be equal on all ranks, by argument name; asked after the checks passed.

    Raises:
        TypeError, ValueError: what the checks raised here, or ValueError for what they raised or found elsewhere.
    """
    if group is None or not dist.is_initialized() or dist.get_rank(group) < 0 or group in _compared:
        yield
        return
    refusal: TypeError | ValueError | None = None
    try:
        yield
    except (TypeError, ValueError) as error:
        refusal = error
    own = (None, description()) if refusal is None else (str(refusal), None)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    if refusal is not None:
        raise refusal
    for rank, (message, _) in enumerate(every):
        if message is not None:
            raise ValueError(f"tp_group: rank {rank} refused its input: {message}")
    first = every[0][1]
    for rank, (_, other) in enumerate(every):
        differing = [name for name in first if first[name] != other[name]]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{name}: rank 0 of tp_group got {first[name]}, rank {rank} got {other[name]}; "
                "all ranks of the group must be given the same"
            )
    _compared.add(group)
