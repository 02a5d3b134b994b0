"""The importance ratio delta, and the one autograd node that every policy loss of this room uses.

Two decisions live here and nowhere else. The log-ratio is clamped before `exp`, so that a token whose
probability moved by e^200 gives a finite number; and a loss is attached to the graph by its value and its
slope, so that no quotient of ratios (`delta / sg(delta)`, infinite over infinite) is ever formed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

DEFAULT_LOG_RATIO_LIMIT = 20.0
"""Log-ratios are taken as at most this far from 0 (nats): delta lies in [2.1e-9, 4.9e8]."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that losses are computed in: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(logprobs: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Detach tensors, bring them to one dtype, and expand them to the shape of `logprobs`.

    Args:
        logprobs: [...], any floating dtype.
        others: tensors that broadcast to exactly that shape.

    Returns:
        `logprobs` and the others, detached, float64 if `logprobs` is float64 and float32 otherwise.

    Raises:
        ValueError: one of the others would enlarge the result (a [T, 1] against a [T], say).
    """
    dtype = compute_dtype(logprobs.dtype)
    result = [logprobs.detach().to(dtype)]
    for other in others:
        sizes = zip(reversed(other.shape), reversed(logprobs.shape), strict=False)
        if other.dim() > logprobs.dim() or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"a tensor of shape {tuple(other.shape)} does not fit logprobs of shape {tuple(logprobs.shape)}: "
                "every per-token tensor must have the shape of logprobs or broadcast to it"
            )
        result.append(other.detach().to(dtype).expand(logprobs.shape))
    return tuple(result)


def clamped_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT
) -> Tensor:
    """Return log(pi_theta / pi_old) per token, clamped to +-log_ratio_limit and detached.

    Equal log-probabilities give exactly 0, also when both are -inf (where a subtraction gives NaN). A NaN
    in either input stays NaN: it is an error that the trainer's finiteness check must see.

    Args:
        logprobs, old_logprobs: [...], nats.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] float32, or float64 for float64 input.
    """
    new, old = aligned(logprobs, old_logprobs)
    difference = torch.where(new == old, torch.zeros_like(new), new - old)
    return difference.clamp(min=-log_ratio_limit, max=log_ratio_limit)


def importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor, log_ratio_limit: float = DEFAULT_LOG_RATIO_LIMIT
) -> Tensor:
    """Return the importance ratio delta of each token: finite, positive, detached.

    Equation: r_t(theta) of Eq. 1, delta of Eqs. 11-18.

    Args:
        logprobs, old_logprobs: [...], nats.
        log_ratio_limit: largest absolute log-ratio, nats.

    Returns:
        [...] float32, or float64 for float64 input; within exp(+-log_ratio_limit).
    """
    return clamped_log_ratio(logprobs, old_logprobs, log_ratio_limit).exp()


class _ValueWithSlope(torch.autograd.Function):
    """A node whose output is `value` and whose derivative with respect to `logprobs` is `slope`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logprobs, _, slope = inputs
        ctx.save_for_backward(slope)
        ctx.input_dtype = logprobs.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad_outputs[0] * slope).to(ctx.input_dtype), None, None


def attach_gradient(logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return `value`, differentiable in `logprobs` with the given slope.

    Where value equals slope this is `value * exp(logprobs - stop_gradient(logprobs))`, without the NaN
    that the subtraction gives at -inf.

    Args:
        logprobs: [...], where the gradient goes.
        value, slope: [...], detached, of `logprobs`' shape.

    Returns:
        [...], dtype of `value`.
    """
    return cast(Tensor, _ValueWithSlope.apply(logprobs, value, slope))  # type: ignore[no-untyped-call]
