"""Things that all ranks do together, so that what fails on one of them fails on all of them, with one message.

Without this a rank that meets a full disk would leave the others waiting for it in their next exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_klear.checkpoint import layout
from megatron_klear.errors import CheckpointError
from megatron_klear.records import ParallelContext

_Found = TypeVar("_Found")


def together(what: str, action: Callable[[], object], context: ParallelContext, *, only_first: bool = False) -> None:
    """Do something on all ranks, or on rank 0 for all, and fail on all of them if it fails on any.

    Args:
        what: names the action in the message, as in "cannot ...".
        action: what to do; exchanges between ranks in it must themselves end on all ranks when one fails.
        context: the layout.
        only_first: whether rank 0 acts alone.

    Raises:
        CheckpointError: says which ranks failed and why.
    """
    problem: dict[int, str] = {}
    if not only_first or context.world.rank == 0:
        try:
            action()
        except CheckpointException as error:  # from torch, on every rank alike: what went wrong on which rank
            problem = {rank: _described(cause) for rank, (cause, _) in error.failures.items()}
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = {context.world.rank: _described(error)}
    everywhere: list[dict[int, str] | None] = [None] * context.world.size
    dist.all_gather_object(everywhere, problem)
    problems = {rank: text for part in everywhere if part for rank, text in part.items()}
    if problems:
        causes = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(problems.items()))
        raise CheckpointError(f"cannot {what}: {causes}")


def cause_of(error: BaseException) -> BaseException:
    """What the system said, if that is behind an error: torch's writer answers a full disk with one of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and str(seen):  # a TimeoutError without words is one, too
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _described(error: BaseException) -> str:
    cause = cause_of(error)
    text = str(cause) or "no further message"
    return text if isinstance(cause, CheckpointError | OSError) else f"{type(cause).__name__}: {text}"


def agree(what: str, read: Callable[[], _Found], context: ParallelContext) -> _Found:
    """What rank 0 reads, on every rank.

    Args:
        what: names the action in the message, as in "cannot ...".
        read: called on rank 0; what it returns must be picklable.
        context: the layout.

    Raises:
        CheckpointError: reading failed.
    """
    found: list[_Found] = []
    together(what, lambda: found.append(read()), context, only_first=True)
    sent: list[_Found | None] = [found[0] if found else None]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]  # type: ignore[return-value]


def damage_of(directory: Path, context: ParallelContext) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank; empty when it is whole. Ranks share the reading."""
    try:
        expected = sorted(layout.read_manifest(directory).items())
        mine = layout.damage(directory, dict(expected[context.world.rank :: context.world.size]))
    except CheckpointError as error:
        mine = [str(error)]
    parts: list[list[str] | None] = [None] * context.world.size
    dist.all_gather_object(parts, mine)
    return sorted({problem for part in parts if part for problem in part})
