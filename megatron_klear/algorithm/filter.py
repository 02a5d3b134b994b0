"""Filtering of groups that carry no signal (Section 5.2.5)."""

from __future__ import annotations

from torch import Tensor


def zero_advantage_mask(advantages: Tensor) -> Tensor:
    """Say which groups have no advantage at all: every response right, every response wrong, or none graded.

    Equation: Section 5.2.5. `group_advantages` makes such advantages exactly 0, so no tolerance is needed.
    A NaN is not zero: it stays in the batch, for the finiteness check to find.

    Args:
        advantages: [..., M], one group along the last dimension, 0 where ungraded.

    Returns:
        bool [...], true for the groups to leave out.

    Raises:
        ValueError: `advantages` has no group dimension.
    """
    if advantages.dim() == 0:
        raise ValueError("advantages must have a last dimension of responses, got a scalar")
    return (advantages == 0).all(dim=-1)
