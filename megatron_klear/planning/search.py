"""Layouts that a model could be trained in on so many devices, the fastest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_klear.config import Entry, ParallelSettings, Settings
from megatron_klear.config.checks import find_problems
from megatron_klear.planning.devices import DEVICES
from megatron_klear.planning.estimate import Assumptions, Plan, make_plan
from megatron_klear.planning.lengths import StoredLengths
from megatron_klear.planning.workload import idle_ranks

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout and what it would take.

    Attributes:
        parallel: sizes and flags.
        recompute: activations to compute again.
        plan: the plan.
    """

    parallel: ParallelSettings
    recompute: Recompute
    plan: Plan

    @property
    def overrides(self) -> str:
        """It as settings of a command line."""
        p = self.parallel
        return (
            f"parallel.tp={p.tp} parallel.pp={p.pp} parallel.cp={p.cp} "
            f"parallel.sequence_parallel={str(p.sequence_parallel).lower()} model.recompute={self.recompute}"
        )


def best_layouts(
    settings: Settings, *, entry: Entry, gpus: int, device_name: str, assumptions: Assumptions | None = None,
    lengths: StoredLengths | None = None,
) -> list[Candidate]:  # fmt: skip
    """Every layout that the settings' checks let pass and that fits into memory, fastest first.

    Sizes of tensor (within a node), context and pipeline parallelism and the recompute policy vary; sequence
    parallelism goes with tensor parallelism; everything else stays as it is set, and lengths are the same for all.
    Layouts that are equally fast are ordered by memory.
    """
    found = []
    for changed in _variants(settings, gpus, DEVICES[device_name].per_node):
        if _problems(changed, entry, gpus, device_name):
            continue
        plan = make_plan(
            changed, entry=entry, gpus=gpus, device_name=device_name, assumptions=assumptions, lengths=lengths
        )
        if plan.fits:
            found.append(Candidate(parallel=changed.parallel, recompute=changed.model.recompute, plan=plan))
    return sorted(found, key=lambda candidate: (round(candidate.plan.time.total, 6), candidate.plan.peak))


def settings_in_the_way(settings: Settings, *, entry: Entry, gpus: int, device_name: str) -> list[str]:
    """Settings that have a problem in every layout of a search: there is nothing to rank before they are changed."""
    common: dict[str, None] | None = None
    for changed in _variants(settings, gpus, DEVICES[device_name].per_node):
        named = [problem.partition(":")[0] for problem in _problems(changed, entry, gpus, device_name)]
        common = dict.fromkeys(name for name in named if common is None or name in common)
        if not common:
            return []
    return list(common or ())


def device_problems(settings: Settings, *, entry: Entry, gpus: int, device_name: str) -> list[str]:
    """Why a run should not be on so many of these devices, beside what its own checks find."""
    device, recipe = DEVICES[device_name], settings.fp8.recipe
    found = idle_ranks(settings, entry, gpus)
    if recipe != "none" and device.fp8_flops is None:
        found.append(f"fp8.recipe: got {recipe}, and {device.title} has no FP8; set none, or another --gpu")
    return found


def _problems(settings: Settings, entry: Entry, gpus: int, device_name: str) -> list[str]:
    found = find_problems(
        settings,
        entry=entry,
        world_size=gpus,
        broken=frozenset(),
        inputs=False,
        ranks_per_machine=min(DEVICES[device_name].per_node, gpus),
    )
    return found + device_problems(settings, entry=entry, gpus=gpus, device_name=device_name)


def _variants(settings: Settings, gpus: int, per_node: int) -> Iterator[Settings]:
    for tp in _divisors(gpus):
        for cp in _divisors(gpus // tp):
            for pp in _divisors(gpus // tp // cp):
                if tp > per_node or settings.architecture.num_layers % pp:
                    continue
                parallel = dataclasses.replace(settings.parallel, tp=tp, cp=cp, pp=pp, sequence_parallel=tp > 1)
                for recompute in get_args(Recompute):
                    model = dataclasses.replace(settings.model, recompute=recompute)
                    yield dataclasses.replace(settings, parallel=parallel, model=model)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
