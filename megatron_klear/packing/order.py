"""Random orders that are a function of their seeds alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_klear.records import IntArray


def seeded_draws(count: int, *seeds: int) -> NDArray[np.uint64]:
    """Random numbers, uint64 [count]; the same over versions of numpy, which guarantees only the raw stream."""
    draws: NDArray[np.uint64] = np.random.Philox(np.random.SeedSequence(list(seeds))).random_raw(count)
    return draws


def seeded_order(count: int, *seeds: int) -> IntArray:
    """A random order of 0 .. count - 1, int64 [count]."""
    return np.argsort(seeded_draws(count, *seeds), kind="stable").astype(np.int64, copy=False)
