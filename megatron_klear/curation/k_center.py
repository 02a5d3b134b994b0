"""K-Center greedy selection, farthest point first, by scikit-matter.

Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985): the largest distance of any point to the
chosen ones is at most twice that of the best possible choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_PARTS = 100
"""Progress is told this often; the library copies what it has chosen every time."""


def k_center_greedy(
    points: NDArray[np.float64], k: int, *, first: int, advance: Callable[[int], None] = lambda count: None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose k points; copies of chosen ones come after all points that differ.

    One matrix-vector product per choice, on the CPU. Float64, since a squared distance is a difference of products: of
    two points of length 1 that are 1e-4 apart, float32 would leave nothing but rounding. Memory is that of `points`,
    as much again for a moment, three numbers per point, and up to twice k times D numbers of what was chosen.

    Args:
        points: float64 [N, D], N and D at least 2, all finite; may be mapped from a file.
        k: how many to choose, at most N.
        first: index of the first choice.
        advance: told how many more were chosen.

    Returns:
        The chosen indices int64 [k] in order, and the covering radius float64 [k] after each choice: the largest
        distance of a point to the nearest chosen one.
    """
    from sklearn import config_context
    from skmatter.sample_selection import FPS

    selector = FPS(initialize=first)
    step = max(1, k // _PARTS)
    with config_context(assume_finite=True):  # else all points are looked at once more for every choice
        for until in (*range(1, k, step), k):
            selector.n_to_select = until
            before = getattr(selector, "n_selected_", 0)
            selector.fit(points, warm_start=before > 0)
            advance(until - before)
    chosen = np.asarray(selector.selected_idx_, np.int64)
    left = np.delete(selector.hausdorff_, chosen)
    squared = [*selector.hausdorff_at_select_[chosen[1:]], left.max(initial=0.0)]
    return chosen, np.sqrt(np.clip(squared, 0.0, None))  # rounding can leave copies a little below 0
