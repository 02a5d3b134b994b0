"""Chunked PyTorch backend: any device, any process group; the path every other backend is compared with."""

from __future__ import annotations

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HiddenGradient, WeightGradient
from klear_kernels.softmax_rows import LogitBuffer, RowStatistics, exponentiate_, row_gradient_


def forward(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of the problem's K rows, one chunk of logits at a time (2 K H V operations)."""
    rows = RowStatistics.empty(problem)
    buffer = LogitBuffer(problem)
    for chunk in problem.chunks():
        logits = buffer.logits(problem.hidden_rows(chunk))
        rows.write(chunk, exponentiate_(logits, problem.label_rows(chunk), problem))
    return rows


def backward(
    problem: HeadProblem,
    rows: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    *,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Recompute each chunk's logits and form the wanted gradients (6 K H V operations for both).

    Args:
        problem: the rows whose upstream gradient is not zero.
        rows: their statistics from the forward pass.
        grad_logprobs, grad_entropy: upstream gradients [K] in the compute dtype.
        for_hidden, for_weight: which gradients are wanted.
    """
    hidden_gradient = HiddenGradient(problem) if for_hidden else None
    weight_gradient = WeightGradient(problem) if for_weight else None
    buffer = LogitBuffer(problem)
    for chunk in problem.chunks():
        hidden = problem.hidden_rows(chunk)
        gradient = row_gradient_(
            buffer.logits(hidden),
            problem.label_rows(chunk),
            rows.select(chunk),
            grad_logprobs[chunk],
            None if grad_entropy is None else grad_entropy[chunk],
            problem,
        )
        if hidden_gradient is not None:
            hidden_gradient.add(chunk, gradient)
        if weight_gradient is not None:
            weight_gradient.add(hidden, gradient)
    return (
        None if hidden_gradient is None else hidden_gradient.finish(),
        None if weight_gradient is None else weight_gradient.finish(),
    )
