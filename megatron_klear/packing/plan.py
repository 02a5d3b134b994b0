"""Which sequence goes into which microbatch of which data-parallel rank.

All ranks wait for one another at every optimizer update, so what counts is the slowest rank: fewest microbatches
first, then work spread evenly. Bins are packed over all ranks and dealt by tokens and attention cost; where that leaves
ranks uneven, sequences are dealt by what they cost (see `even.py`), with one microbatch more where that pays.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_klear.packing.even import deal_by_cost
from megatron_klear.packing.fitting import fullest_with_room
from megatron_klear.packing.flops import sequence_cost
from megatron_klear.packing.layout import round_up
from megatron_klear.packing.oversize import OversizePolicy, fitting_sequences
from megatron_klear.records import IntArray

Bins = list[list[int]]
"""Sequences (indices) of each microbatch."""

_SAME_TOKENS = 0.005
"""Token counts that differ by less than this share of a microbatch are equal: there attention cost decides."""

_MICROBATCH_COST = 0.02
"""What one more microbatch costs, in shares of a full one: its kernels are shorter, and it is launched."""

_TIGHTENINGS = 6
"""Halvings of the interval in which the smallest capacity that still fits is sought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Microbatches of every data-parallel rank; the same on every rank that plans the same lengths.

    Attributes:
        microbatches: [dp][number of microbatches], each the indices of its sequences, ascending, possibly none.
        dropped: indices of sequences over the budget that the policy left out.
        token_budget: tokens that a microbatch may hold.
        tokens: int64 [dp, number of microbatches], padded tokens of each.
        cost: float64 [dp, number of microbatches], work of each, in matrix products of a token (`sequence_cost`).
        attention_cost: float64 [dp, number of microbatches], sum of squared padded lengths of each.
    """

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]
    dropped: tuple[int, ...]
    token_budget: int
    tokens: IntArray
    attention_cost: NDArray[np.float64]
    cost: NDArray[np.float64]

    @property
    def num_microbatches(self) -> int:
        """Microbatches per data-parallel rank."""
        return int(self.tokens.shape[1])

    @property
    def budget_used(self) -> float:
        """Share of all microbatches' token budgets that holds a token or its sequence's padding."""
        return float(self.tokens.sum()) / (self.tokens.size * self.token_budget)

    @property
    def token_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean, 1.0 being perfect."""
        return _imbalance(self.tokens.sum(axis=1))

    @property
    def cost_imbalance(self) -> float:
        """Work of the rank with the most over the mean, 1.0 being perfect."""
        return _imbalance(self.cost.sum(axis=1))

    @property
    def attention_imbalance(self) -> float:
        """Attention cost of the costliest rank over the mean, 1.0 being perfect."""
        return _imbalance(self.attention_cost.sum(axis=1))


def plan_packs(
    lengths: Sequence[int] | NDArray[np.integer],
    *,
    token_budget: int,
    dp_size: int = 1,
    multiple: int = 1,
    share: float = 0.0,
    oversize: OversizePolicy = "refuse",
    names: Sequence[str] | None = None,
) -> PackPlan:
    """Plan the microbatches of one optimizer update (or one scoring pass) over all data-parallel ranks.

    Every rank gets the same number of microbatches, at least one, and microbatch 0 is the fullest on every rank.
    Depends on nothing but the arguments.

    Args:
        lengths: tokens of each sequence, [N]; each at least 1.
        token_budget: tokens of a microbatch over its context-parallel group (packing.token_budget).
        dp_size: data-parallel ranks.
        multiple: each sequence is padded to a multiple of this (`sequence_multiple`); the padding counts.
        share: attention's share of the cost, see `attention_share`; 0 evens out tokens alone.
        oversize: `refuse` or `drop` sequences that do not fit (packing.oversize).
        names: names of the sequences for messages, [N].

    Raises:
        DataError: under `refuse`, naming sequences over the budget, or saying how many they are without names.
        ValueError: a length, size or budget below 1.
    """
    counts = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if min(token_budget, dp_size, multiple) < 1 or np.any(counts < 1):
        raise ValueError("plan_packs needs lengths, token_budget, dp_size and multiple of at least 1")
    kept, dropped = fitting_sequences(
        counts, token_budget=token_budget, multiple=multiple, oversize=oversize, names=names
    )
    padded = round_up(counts, multiple)
    cost = sequence_cost(padded, share)
    bins = _fill(padded, kept, token_budget, dp_size)
    tokens = np.array([padded[members].sum() for members in bins], dtype=np.int64)
    squares = np.array([np.square(padded[members], dtype=np.float64).sum() for members in bins])
    rows = _assign(tokens, squares, dp_size, token_budget)
    dealt = [[bins[b] for b in rows[:, rank]] for rank in range(dp_size)]
    if dp_size > 1:
        dealt = _evened(dealt, padded, cost, kept, token_budget)
    return _plan(dealt, padded, cost, tuple(dropped.tolist()), token_budget)


def _plan(
    dealt: list[Bins], padded: IntArray, cost: NDArray[np.float64], dropped: tuple[int, ...], token_budget: int
) -> PackPlan:
    def sums(values: NDArray[np.integer] | NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([[values[members].sum() for members in rank] for rank in dealt], dtype=np.float64)

    return PackPlan(
        microbatches=tuple(tuple(tuple(sorted(members)) for members in rank) for rank in dealt),
        dropped=dropped,
        token_budget=token_budget,
        tokens=sums(padded).astype(np.int64),
        attention_cost=sums(np.square(padded, dtype=np.float64)),
        cost=sums(cost),
    )


def _evened(
    dealt: list[Bins], padded: IntArray, cost: NDArray[np.float64], kept: IntArray, token_budget: int
) -> list[Bins]:
    """The microbatches dealt, or those of sequences dealt by cost, whichever ends first on its slowest rank."""

    def slowest(some: list[Bins]) -> float:
        work = max(sum(float(cost[members].sum()) for members in rank) for rank in some)
        return work + len(some[0]) * _MICROBATCH_COST * token_budget

    sizes, found = padded[kept].tolist(), [dealt]
    for count in (len(dealt[0]), len(dealt[0]) + 1):
        by_cost = deal_by_cost(
            sizes,
            cost[kept],
            capacity=count * token_budget,
            dp_size=len(dealt),
            pack=lambda items, count=count: _pack_rank(items, sizes, count, token_budget),  # type: ignore[misc]
        )
        if by_cost is not None:
            found.append([[[int(kept[item]) for item in members] for members in rank] for rank in by_cost])
    return min(found, key=slowest)


def _pack_rank(items: list[int], sizes: list[int], count: int, budget: int) -> Bins | None:
    """One rank's sequences in so many microbatches, as evenly as can be, the fullest first; None if they do not fit."""
    order = sorted(items, key=lambda item: (-sizes[item], item))
    descending = [sizes[item] for item in order]
    bins = _spread(descending, count, budget)
    if bins is None:
        fitted = best_fit(descending, budget)
        if len(fitted) > count:
            return None
        bins = _tightened(descending, fitted, count, budget)
    filled = [[order[place] for place in members] for members in bins]
    return sorted(filled, key=lambda members: -sum(sizes[item] for item in members))


def _fill(padded: IntArray, kept: IntArray, budget: int, dp_size: int) -> Bins:
    """Distribute sequences over as few microbatches as can be, a multiple of dp, as evenly as can be.

    Spreading evenly (next sequence to the emptiest microbatch) balances best but wastes slots when they are scarce;
    best fit wastes least but leaves the last microbatches empty. So: spread if that needs no more microbatches, else
    fit, and lower the capacity as long as the sequences still fit into the same number.
    """
    order = kept[np.argsort(-padded[kept], kind="stable")]
    sizes = padded[order].tolist()
    total = sum(sizes)
    fewest = _whole_rows(-(-total // budget), dp_size)
    spread = _spread(sizes, fewest, budget)
    if spread is None:
        fitted = best_fit(sizes, budget)
        count = _whole_rows(len(fitted), dp_size)
        if count > fewest:
            spread = _spread(sizes, count, budget)
        if spread is None:
            spread = _tightened(sizes, fitted, count, budget)
    return [[int(order[item]) for item in members] for members in spread]


def _whole_rows(bins: int, dp_size: int) -> int:
    """Round a number of microbatches up to one that every rank gets equally many of, at least one."""
    return max(1, -(-bins // dp_size)) * dp_size


def _spread(sizes: list[int], count: int, capacity: int) -> Bins | None:
    """Give each item (descending sizes) to the emptiest of `count` bins; None once one overflows."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item, size in enumerate(sizes):
        load, number = heap[0]
        if load + size > capacity:
            return None
        bins[number].append(item)
        heapq.heapreplace(heap, (load + size, number))
    return bins


def best_fit(sizes: list[int], capacity: int) -> Bins:
    """Put each item (descending sizes) into the fullest bin that has room, opening bins as needed."""
    numbers = fullest_with_room(sizes, capacity).tolist()
    bins: Bins = [[] for _ in range(max(numbers, default=-1) + 1)]
    for item, number in enumerate(numbers):
        bins[number].append(item)
    return bins


def _tightened(sizes: list[int], fitted: Bins, count: int, capacity: int) -> Bins:
    """Best fit at the smallest capacity found that needs at most `count` bins; empty bins fill the count."""
    low, high = max(sizes[0], -(-sum(sizes) // count)), capacity
    for _ in range(_TIGHTENINGS):
        if high - low <= _SAME_TOKENS * capacity:
            break
        middle = (low + high) // 2
        tried = best_fit(sizes, middle)
        if len(tried) <= count:
            fitted, high = tried, middle
        else:
            low = middle
    return fitted + [[] for _ in range(count - len(fitted))]


def _assign(tokens: IntArray, cost: NDArray[np.float64], dp_size: int, budget: int) -> IntArray:
    """Deal bins to ranks: int64 [number of microbatches, dp] of bin numbers.

    Bins sorted by size are cut into rows of dp; each rank gets one of every row, so ranks differ by little more than
    a row's spread. The most uneven rows are dealt first, and the later ones even out what they left.
    """
    by_size = np.lexsort((-cost, -tokens)).reshape(-1, dp_size)
    sorted_tokens = tokens[by_size]
    uneven_first = np.argsort(sorted_tokens[:, -1] - sorted_tokens[:, 0], kind="stable")
    size_class = np.round(tokens / max(1.0, _SAME_TOKENS * budget))
    rank_tokens, rank_cost = np.zeros(dp_size), np.zeros(dp_size)
    dealt = np.empty_like(by_size)
    for row in uneven_first:
        bins = by_size[row]
        bins = bins[np.lexsort((-cost[bins], -size_class[bins]))]
        # The emptiest ranks get the class of the largest bins; within a class, the cheapest rank gets the costliest.
        rank_class = np.empty(dp_size)
        rank_class[np.argsort(rank_tokens, kind="stable")] = size_class[bins]
        ranks = np.lexsort((rank_cost, -rank_class))
        dealt[row, ranks] = bins
        rank_tokens[ranks] += tokens[bins]
        rank_cost[ranks] += cost[bins]
    return dealt


def _imbalance(per_rank: NDArray[np.integer] | NDArray[np.float64]) -> float:
    mean = float(per_rank.mean())
    return float(per_rank.max()) / mean if mean else 1.0
