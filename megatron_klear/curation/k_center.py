"""K-Center greedy selection: each next point is the one farthest from all chosen so far.

Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985): the largest distance of any point to the
chosen ones is at most twice that of the best possible choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

_CLOSE = 1e-3
"""Squared distances below this are computed from differences: of 2 - 2 a.b little but rounding would be left there,
and copies of a chosen point would pass for points some 5e-4 away from it."""

_ROWS_AT_ONCE = 1 << 16


def k_center_greedy(
    points: torch.Tensor, k: int, *, first: int, advance: Callable[[int], None] = lambda count: None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose k points of unit length; of equally far ones the lowest index, where rounding leaves them equal.

    One matrix-vector product per choice, and a second look at points close to the choice: memory is that of `points`,
    one number per point, and 65,536 points more. Copies are chosen after all points that differ.

    Args:
        points: float32 [N, D], rows of length 1; on any device.
        k: how many to choose, at most N.
        first: index of the first choice.
        advance: told of every choice.

    Returns:
        The chosen indices int64 [k] in order, and the covering radius float32 [k] after each choice: the largest
        distance of a point to the nearest chosen one.
    """
    nearest = torch.full((len(points),), float("inf"), device=points.device)
    chosen: list[int] = []
    radii: list[torch.Tensor] = []
    index = torch.tensor(first, device=points.device)
    for _ in range(k):
        squared = 2.0 - 2.0 * (points @ points[index])  # |a - b|^2 between points of length 1
        for close in (squared < _CLOSE).nonzero()[:, 0].split(_ROWS_AT_ONCE):
            squared[close] = (points[close] - points[index]).square().sum(dim=1)
        torch.minimum(nearest, squared, out=nearest)
        nearest[index] = -1.0  # below every distance: no point is chosen twice, also among equal ones
        chosen.append(int(index))
        farthest, index = nearest.max(dim=0)
        radii.append(farthest.clamp(min=0.0).sqrt())
        advance(1)
    return np.array(chosen, np.int64), torch.stack(radii).float().cpu().numpy()
