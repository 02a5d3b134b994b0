"""K-Center greedy selection: each next point is the one farthest from all chosen so far.

Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985): the largest distance of any point to the
chosen ones is at most twice that of the best possible choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray


def k_center_greedy(
    points: torch.Tensor, k: int, *, first: int, advance: Callable[[int], None] = lambda count: None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose k points of unit length; of equally far ones the lowest index.

    One matrix-vector product per choice: memory is that of `points` and one number per point.

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
        # |a - b|^2 = 2 - 2 a.b between points of length 1; rounding must not make it negative.
        squared = (2.0 - 2.0 * (points @ points[index])).clamp_(min=0.0)
        torch.minimum(nearest, squared, out=nearest)
        nearest[index] = -1.0  # below every distance: no point is chosen twice, also among equal ones
        chosen.append(int(index))
        farthest, index = nearest.max(dim=0)
        radii.append(farthest.clamp(min=0.0).sqrt())
        advance(1)
    return np.array(chosen, np.int64), torch.stack(radii).float().cpu().numpy()
