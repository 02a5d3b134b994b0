"""Checksums of what the trainer sent against those of what the engines hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_klear.errors import WeightSyncError
from megatron_klear.records import ParallelContext
from megatron_klear.weight_sync.engine_tensors import engine_tensors
from megatron_klear.weight_sync.engines import EngineGroup, EngineLayout
from megatron_klear.weight_sync.hashes import engine_hash

_SHOWN = 12
_PATH = "/weights_checker"


class ExpectedChecksums:
    """The checksums that engines must report, gathered while the weights stream by; the ranks share the work.

    Args:
        layout: how engines hold weights.
        head_dim: channels of an attention head.
        context: the trainer's layout.
    """

    def __init__(self, layout: EngineLayout, *, head_dim: int, context: ParallelContext) -> None:
        self._layout, self._head_dim, self._context = layout, head_dim, context
        self._mine: dict[str, list[str]] = {}

    def watch(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the stream on, and hash this rank's share of the engines' tensors as their parts go by."""
        seen: list[tuple[str, torch.Tensor]] = []

        def passing() -> Iterator[tuple[str, torch.Tensor]]:
            for pair in named_tensors:
                seen.append(pair)
                yield pair

        rank, size = self._context.world.rank, self._context.world.size
        for number, (name, shards) in enumerate(engine_tensors(passing(), tp=self._layout.tp, head_dim=self._head_dim)):
            if number % size == rank:
                self._mine[name] = [engine_hash(shard, self._layout.device) for shard in shards]
            yield from seen
            seen.clear()

    def gather(self) -> list[dict[str, str]]:
        """Checksum by tensor, for each of an engine's ranks (a collective)."""
        parts: list[Any] = [None] * self._context.world.size
        dist.all_gather_object(parts, self._mine)
        whole = {name: hashes for part in parts for name, hashes in part.items()}
        return [{name: hashes[rank] for name, hashes in whole.items()} for rank in range(self._layout.tp)]


def verify(engines: EngineGroup, expected: list[dict[str, str]]) -> bool:
    """Compare all engines' checksums with the trainer's.

    Args:
        engines: who holds the weights.
        expected: checksum by tensor, for each of an engine's ranks.

    Returns:
        false when the engines cannot tell checksums.

    Raises:
        WeightSyncError: they differ; names engines, ranks and tensors.
    """
    answers = engines.try_call(_PATH, {"action": "checksum"})
    if answers is None:
        return False
    problems = []
    for caller, answer in zip(engines.callers, answers, strict=True):
        try:
            reported = [dict(rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, TypeError, ValueError) as error:
            raise WeightSyncError(
                f"{caller.name}: {_PATH} answered without checksums ({type(error).__name__}: {error})"
            ) from error
        if len(reported) != len(expected):
            problems.append(f"{caller.name}: checksums of {len(reported)} ranks, expected {len(expected)}")
            continue
        for rank, (ours, theirs) in enumerate(zip(expected, reported, strict=True)):
            where = caller.name if len(expected) == 1 else f"{caller.name}, rank {rank}"
            problems += [f"{where}: {text}" for text in differences(ours, theirs)]
    if problems:
        raise WeightSyncError("an engine's weights are not the trainer's: " + "; ".join(problems))
    return True


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What separates two sets of checksums, by name of tensor; empty when nothing does."""
    kinds = {
        "differ": [name for name in ours if name in theirs and theirs[name] != ours[name]],
        "missing": [name for name in ours if name not in theirs],
        "not of this model": [name for name in theirs if name not in ours],
    }
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
