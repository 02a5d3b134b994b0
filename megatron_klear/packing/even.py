"""Few sequences for many ranks: deal out sequences by what they cost, and let each rank pack its own.

Bins that are packed first and dealt afterwards differ in cost, as one long sequence has more attention than many short
ones, and a rank of few bins cannot even that out. Dealing sequences can: the costliest first, each to the rank with the
least so far, then moves and swaps that lower the costliest rank. What remains is what one costs more than another.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Pack = Callable[[list[int]], list[list[int]] | None]
"""Packs sequences into the microbatches of one rank; None when they do not fit."""

_TRIES_PER_RANK = 8
"""Moves or swaps tried to lower the costliest rank, in ranks."""
_EVEN_ENOUGH = 0.002
"""Stop when the costliest rank is so close to the mean: other things matter more."""


def deal_by_cost(
    sizes: Sequence[int], cost: NDArray[np.float64], *, capacity: int, dp_size: int, pack: Pack
) -> list[list[list[int]]] | None:
    """Microbatches of every rank, [dp][number of microbatches], each the places of its sequences in `sizes`.

    Args:
        sizes: tokens of each sequence.
        cost: of each sequence, float64 [N].
        capacity: tokens of all microbatches of a rank.
        dp_size: ranks.
        pack: see `Pack`.

    Returns:
        None when a rank's sequences do not fit into its microbatches.
    """
    members = _largest_first(sizes, cost, capacity, dp_size)
    packed = None if members is None else [pack(some) for some in members]
    if members is None or packed is None or any(one is None for one in packed):
        return None
    load = np.array([cost[some].sum() for some in members])
    tries = _TRIES_PER_RANK * dp_size
    while tries > 0 and load.max() > (1 + _EVEN_ENOUGH) * load.mean():
        tries -= 1
        costliest = int(load.argmax())
        if len(members[costliest]) < 2 or not _improve(costliest, members, packed, load, sizes, cost, capacity, pack):
            break
    return [one for one in packed if one is not None]


def _largest_first(
    sizes: Sequence[int], cost: NDArray[np.float64], capacity: int, dp_size: int
) -> list[list[int]] | None:
    """Each sequence, costliest first, to the rank with the least that has room; None when one finds no room."""
    members: list[list[int]] = [[] for _ in range(dp_size)]
    tokens = [0] * dp_size
    heap = [(0.0, rank) for rank in range(dp_size)]
    for item in np.argsort(-cost, kind="stable").tolist():
        full = []
        while heap and tokens[heap[0][1]] + sizes[item] > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, rank = heapq.heappop(heap)
        members[rank].append(item)
        tokens[rank] += sizes[item]
        for entry in (*full, (load + float(cost[item]), rank)):
            heapq.heappush(heap, entry)
    return members


def _improve(
    rank: int,
    members: list[list[int]],
    packed: list[list[list[int]] | None],
    load: NDArray[np.float64],
    sizes: Sequence[int],
    cost: NDArray[np.float64],
    capacity: int,
    pack: Pack,
) -> bool:
    """Move a sequence from this rank to another one, or swap two, so that the higher of both loads falls the most."""
    mine = members[rank]
    best: list[tuple[float, int, int, int | None]] = []
    for other in range(len(members)):
        if other == rank:
            continue
        theirs: list[int | None] = [None, *members[other]]
        given = cost[mine][:, None] - np.array([0.0, *cost[members[other]]])[None, :]
        after = np.maximum(load[rank] - given, load[other] + given)
        i, j = np.unravel_index(int(after.argmin()), after.shape)
        if after[i, j] < load[rank]:
            best.append((float(after[i, j]), other, mine[i], theirs[j]))
    for _, other, give, take in sorted(best, key=lambda found: found[:3])[:4]:
        ours = [item for item in mine if item != give] + ([] if take is None else [take])
        others = [item for item in members[other] if item != take] + [give]
        if max(sum(sizes[item] for item in some) for some in (ours, others)) > capacity:
            continue
        both = pack(ours), pack(others)
        if both[0] is None or both[1] is None:
            continue
        members[rank], members[other] = ours, others
        packed[rank], packed[other] = both
        load[rank], load[other] = cost[ours].sum(), cost[others].sum()
        return True
    return False
