"""Best fit: each sequence into the fullest bin that has room; in arrays, so that millions take little memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_STRETCH = 1 << 16
"""Sizes that are Python integers at the same time."""


def fullest_with_room(sizes: Sequence[int] | NDArray[np.integer], capacity: int) -> NDArray[np.int32]:
    """Put each item into the fullest bin that has room, opening bins as needed.

    Args:
        sizes: of the items, [N], descending; none above `capacity`.
        capacity: of a bin.

    Returns:
        int32 [N], the bin of each item; bins are numbered in the order of their opening.
    """
    found = array("i")
    smallest = int(sizes[-1]) if len(sizes) else 0
    opened = 0
    with_room: dict[int, array[int]] = {}  # bins by free tokens
    free_counts: list[int] = []  # the keys of `with_room`, ascending
    for size in _python_integers(sizes):
        place = bisect_left(free_counts, size)
        if place == len(free_counts):
            free, number = capacity, opened
            opened += 1
        else:
            free = free_counts[place]
            number = with_room[free].pop()
            if not with_room[free]:
                del with_room[free], free_counts[place]
        found.append(number)
        left = free - size
        if left >= smallest:
            if left not in with_room:
                insort(free_counts, left)
                with_room[left] = array("i")
            with_room[left].append(number)
    return np.frombuffer(found, dtype=np.int32) if len(found) else np.empty(0, dtype=np.int32)


def _python_integers(sizes: Sequence[int] | NDArray[np.integer]) -> Iterator[int]:
    """The sizes one by one; numpy's own integers would be several times slower to compare and to look up."""
    if not isinstance(sizes, np.ndarray):
        yield from sizes
        return
    for start in range(0, len(sizes), _STRETCH):
        yield from sizes[start : start + _STRETCH].tolist()
