"""A whole epoch's sequences in full bins, and bins in steps that are all alike; the same for any layout.

Best fit over an epoch fills all bins but the last to the brim. Bins of equal size still differ in cost, as one long
sequence has more attention than many short ones. So bins are sorted by cost and cut into as many strata as a step has
bins, and a step gets one bin of each, drawn at random: steps hold nearly the same number of sequences and the same mix
of costs, from which every data-parallel rank can be dealt the same amount.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_klear.packing.fitting import fullest_with_room
from megatron_klear.packing.flops import sequence_cost
from megatron_klear.packing.layout import round_up
from megatron_klear.packing.order import seeded_draws, seeded_order
from megatron_klear.packing.plan import Bins
from megatron_klear.records import IntArray

_STRETCH = 1 << 16
"""Bins whose cost is computed at the same time: every rank plans, so that temporary arrays are kept small."""

_FULL = 0.95
"""A bin that is less full is left for the last step, which is packed anew for the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochBins:
    """The bins of an epoch in the order of training.

    Attributes:
        rows: int32 [sequences], sequence numbers, bin after bin.
        starts: int64 [bins + 1], where each bin begins in `rows`.
        bins_per_step: bins of every step but the last, which has what is left: at least half as many, and less than one
            and a half times as many, unless the whole epoch has fewer.
    """

    rows: NDArray[np.int32]
    starts: IntArray
    bins_per_step: int

    @property
    def num_steps(self) -> int:
        """Steps of the epoch; what would be less than half a step joins the step before.

        A lone bin would be an update at the full learning rate with the gradient noise of one bin.
        """
        return max(1, (2 * self.num_bins + self.bins_per_step) // (2 * self.bins_per_step))

    @property
    def num_bins(self) -> int:
        """Bins of the epoch."""
        return len(self.starts) - 1

    def step(self, number: int) -> list[IntArray]:
        """Sequence numbers of each bin of a step, int64."""
        first = number * self.bins_per_step
        last = first + self.bins_per_step if number < self.num_steps - 1 else self.num_bins
        return [self.rows[self.starts[b] : self.starts[b + 1]].astype(np.int64) for b in range(first, last)]


def plan_bins(
    lengths: IntArray,
    *,
    token_budget: int,
    bins_per_step: int,
    multiple: int,
    share: float,
    seeds: tuple[int, ...] | None,
) -> EpochBins:
    """Pack an epoch.

    Args:
        lengths: tokens of each sequence, int64 [N]; none over `token_budget` when padded.
        token_budget: tokens of a bin.
        bins_per_step: bins of a step.
        multiple: each sequence is padded to a multiple of this.
        share: attention's share of the cost, see `attention_share`.
        seeds: of the random choices; None makes none.
    """
    padded = round_up(lengths, multiple).astype(np.int32)
    # Longest first, sequences of the same length in random order.
    order: NDArray[np.int32]
    if seeds is None:
        order = np.argsort(-padded, kind="stable").astype(np.int32)
    else:
        order = seeded_order(len(lengths), *seeds, 0).astype(np.int32)
        order = order[np.argsort(-padded[order], kind="stable")]
    numbers = fullest_with_room(padded[order], token_budget)
    counts = np.bincount(numbers)
    rows = order[np.argsort(numbers, kind="stable")]
    del order, numbers
    starts = np.concatenate([[0], np.cumsum(counts)])
    tokens, cost = _of_bins(padded, rows, starts, share)
    trained = _steps(tokens, cost, token_budget, bins_per_step, seeds)
    return EpochBins(
        rows=rows[_members(starts, trained)],
        starts=np.concatenate([[0], np.cumsum(counts[trained])]),
        bins_per_step=bins_per_step,
    )


def _of_bins(
    padded: NDArray[np.int32], rows: NDArray[np.int32], starts: IntArray, share: float
) -> tuple[IntArray, NDArray[np.float64]]:
    """Tokens, int64 [bins], and cost, float64 [bins]."""
    count = len(starts) - 1
    tokens, cost = np.empty(count, dtype=np.int64), np.empty(count)
    for first in range(0, count, _STRETCH):
        last = min(first + _STRETCH, count)
        members = padded[rows[starts[first] : starts[last]]].astype(np.int64)
        offsets = starts[first:last] - starts[first]
        tokens[first:last] = np.add.reduceat(members, offsets)
        cost[first:last] = np.add.reduceat(sequence_cost(members, share), offsets)
    return tokens, cost


def _members(starts: IntArray, bins: IntArray) -> NDArray[np.int32]:
    """Where the sequences of these bins lie, bin after bin: int32 [sequences]."""
    counts = starts[bins + 1] - starts[bins]
    before = np.cumsum(counts) - counts
    places = np.arange(int(counts.sum()), dtype=np.int32)
    places += np.repeat((starts[bins] - before).astype(np.int32), counts)
    return places


def _steps(
    tokens: IntArray, cost: NDArray[np.float64], token_budget: int, bins_per_step: int, seeds: tuple[int, ...] | None
) -> IntArray:
    """Bin numbers in the order of training, int64 [bins]."""
    count = len(tokens)
    by_cost = np.argsort(cost, kind="stable")
    num_last = count % bins_per_step or bins_per_step
    partly = np.flatnonzero(tokens < _FULL * token_budget)
    partly = partly[np.argsort(tokens[partly], kind="stable")][:num_last]
    others = by_cost[~np.isin(by_cost, partly)]
    evenly = ((np.arange(num_last - len(partly)) + 0.5) * len(others) / max(1, num_last - len(partly))).astype(np.int64)
    last = np.concatenate([partly, others[evenly]])
    strata = others[~np.isin(others, last)].reshape(bins_per_step, -1)
    if seeds is not None:
        draws = seeded_draws(strata.size, *seeds, 1).reshape(strata.shape)
        strata = np.take_along_axis(strata, np.argsort(draws, axis=1, kind="stable"), axis=1)
    return np.concatenate([strata.T.reshape(-1), last])


def deal_bins(cost: NDArray[np.float64], dp_size: int) -> IntArray:
    """Deal the bins of a step to data-parallel ranks, equally many to each: int64 [dp, bins / dp] of bin numbers.

    Round after round, costliest bins first, the rank with the least so far gets the costliest of the round.

    Args:
        cost: of each bin, float64 [bins]; their number is a multiple of `dp_size`.
        dp_size: data-parallel ranks.
    """
    rounds = np.argsort(-cost, kind="stable").reshape(-1, dp_size)
    so_far = np.zeros(dp_size)
    dealt = np.empty_like(rounds)
    for number, bins in enumerate(rounds):
        ranks = np.argsort(so_far, kind="stable")
        dealt[number, ranks] = bins
        so_far[ranks] += cost[bins]
    return dealt.T.astype(np.int64)


def bins_of(rows: list[IntArray]) -> Bins:
    """Bins as numbers that count the sequences of the step."""
    ends = np.cumsum([len(members) for members in rows]).tolist()
    return [list(range(end - len(members), end)) for members, end in zip(rows, ends, strict=True)]
