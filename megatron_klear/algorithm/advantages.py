"""Group-relative advantages (Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, graded: Tensor | None = None, *, normalize_std: bool = True) -> Tensor:
    """Return how far each response's reward lies above its group's mean, in standard deviations.

    Equation: Eq. 4, with the population standard deviation (divided by M, not M - 1) and no epsilon under it.
    Where Eq. 4 is 0/0, all rewards of a group being equal, the advantage is exactly 0.

    Ungraded responses enter neither mean nor deviation, whatever their reward entry holds (NaN included), and
    get advantage 0; a group with fewer than two graded responses gets zeros.

    Args:
        rewards: [..., M] floating, one group of M responses along the last dimension.
        graded: [..., M] bool, false where the grader failed; None means all graded.
        normalize_std: divide by the deviation; if false the advantage is R - mean.

    Returns:
        [..., M], dtype and device of `rewards`; computed in float64.

    Raises:
        ValueError: `rewards` has no group dimension or is not floating, or `graded` has another shape.
    """
    if rewards.dim() == 0 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be floating with a last dimension of responses, got {rewards.dtype} of shape "
            f"{tuple(rewards.shape)}"
        )
    if graded is None:
        graded = torch.ones_like(rewards, dtype=torch.bool)
    if graded.shape != rewards.shape:
        raise ValueError(f"graded has shape {tuple(graded.shape)}, rewards {tuple(rewards.shape)}: must be equal")
    if rewards.shape[-1] == 0:
        return torch.zeros_like(rewards)
    graded = graded.to(torch.bool)
    exact = rewards.detach().to(torch.float64)
    zero = torch.zeros_like(exact)
    count = graded.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = torch.where(graded, exact, zero).sum(dim=-1, keepdim=True) / count
    centred = torch.where(graded, exact - mean, zero)
    # Equality is asked of the rewards themselves: the mean of eight times 0.1 is not 0.1, and dividing that
    # rounding error by its own deviation would turn a group without signal into advantages of +-1.
    highest = torch.where(graded, exact, -torch.inf).amax(dim=-1, keepdim=True)
    lowest = torch.where(graded, exact, torch.inf).amin(dim=-1, keepdim=True)
    no_signal = (highest <= lowest).expand_as(centred) | ~graded
    if normalize_std:
        deviation = (centred.square().sum(dim=-1, keepdim=True) / count).sqrt()
        centred = centred / torch.where(highest <= lowest, torch.ones_like(deviation), deviation)
    return torch.where(no_signal, zero, centred).to(rewards.dtype)
