"""Lengths that a plan is made with: those of the first updates that a run would take from its index, or drawn ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_klear.config import BIN_MULTIPLE, Settings
from megatron_klear.data import indexed_lengths, sft_steps
from megatron_klear.packing import STEPS_AHEAD, bins_of, fitting_sequences, plan_bins, require_some, sequence_multiple
from megatron_klear.planning.workload import SPREAD, Workload, lognormal_lengths
from megatron_klear.records import IntArray

_MOST_SEQUENCES = 40_000
"""Of all drawn ones, so that a search stays quick."""


@dataclass(frozen=True, eq=False)
class Updates:
    """Some updates of a run; each object is itself only, so that what is packed of it can be kept.

    Attributes:
        steps: lengths of an update's sequences, int64 [N], and its bins as positions in them, None where it has none.
    """

    steps: tuple[tuple[IntArray, list[list[int]] | None], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredLengths:
    """What an index says of the conversations of `data.sft`.

    Attributes:
        lengths: int64 [N], tokens of each that is trained on.
        left_out: how many are left out for their length.
        updates: the first ones of a run, exactly.
        told: where the index lies.
    """

    lengths: IntArray
    left_out: int
    updates: Updates
    told: str


def stored_lengths(settings: Settings) -> StoredLengths | str:
    """Lengths by the index of `data.sft`, or why there are none.

    Args:
        settings: settings that fit together, with the model's sizes.

    Raises:
        DataError: with these data the run would be refused.
    """
    found = indexed_lengths(settings)
    if found.lengths is None:
        return found.told
    bins = settings.sft.batch_bins is not None
    budget = settings.packing.token_budget
    multiple = BIN_MULTIPLE if bins else sequence_multiple(settings.parallel.cp)
    numbers, dropped = fitting_sequences(
        found.lengths, token_budget=budget, multiple=multiple, oversize=settings.packing.oversize
    )
    require_some(numbers, found.lengths, token_budget=budget, multiple=multiple)
    lengths = found.lengths[numbers]
    walk = sft_steps(settings, lengths)
    steps = [walk.next_step() for _ in range(STEPS_AHEAD)]
    return StoredLengths(
        lengths=lengths,
        left_out=len(dropped),
        updates=Updates(tuple((lengths[step.rows], step.bins) for step in steps)),
        told=found.told,
    )


@lru_cache(maxsize=16)
def drawn_updates(mean: float, longest: int, sequences: int, bins: int | None, budget: int, share: float) -> Updates:
    """Updates of sequences drawn from a log-normal distribution, always the same ones.

    Args:
        mean, longest: of the distribution, see `lognormal_lengths`.
        sequences: of an update.
        bins: of an update, None where it is made of sequences.
        budget: tokens of a bin.
        share: attention's share of the cost, see `packing.attention_share`.
    """
    count = max(1, min(STEPS_AHEAD, _MOST_SEQUENCES // sequences))
    drawn = _draw(np.array(lognormal_lengths(mean, longest)), count * sequences)
    if bins is None:
        return Updates(tuple((drawn[i * sequences : (i + 1) * sequences], None) for i in range(count)))
    epoch = plan_bins(drawn, token_budget=budget, bins_per_step=bins, multiple=BIN_MULTIPLE, share=share, seeds=(0, 0))
    steps = [epoch.step(number) for number in range(max(1, epoch.num_steps - 1))]  # the last one has what is left
    return Updates(tuple((drawn[np.concatenate(rows)], bins_of(rows)) for rows in steps))


def _draw(quantiles: NDArray[np.float64], count: int) -> IntArray:
    rng = np.random.default_rng(0)
    return np.maximum(1, rng.choice(quantiles, size=count)).astype(np.int64)


def lengths_in_words(work: Workload, stored: StoredLengths | None, why_assumed: str) -> str:
    """Which lengths were planned with, and where they are from."""
    mean = f"sequences of {work.mean_tokens:,.0f} tokens on average"
    if stored is None:
        spread = f"log-normal with a spread of {SPREAD:g}, cut off at {work.longest:,}"
        return f"{mean}, {spread}, which is assumed since {why_assumed}"
    out = f", {stored.left_out:,} left out for their length" if stored.left_out else ""
    return f"{mean}, the {len(stored.lengths):,} of data.sft{out}, by the index {stored.told}"
