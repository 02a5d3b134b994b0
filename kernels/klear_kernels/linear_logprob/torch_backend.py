"""Chunked PyTorch backend: any device, any process group; the path every other backend is compared with."""

from __future__ import annotations

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
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
    gradients: HeadGradients,
) -> None:
    """Recompute each chunk's logits and add the wanted gradients (6 K H V operations for both).

    Args:
        problem: the rows whose upstream gradient is not zero.
        rows: their statistics from the forward pass.
        grad_logprobs, grad_entropy: upstream gradients [K] in the compute dtype.
        gradients: takes the gradients.
    """
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
        gradients.add(problem.rows[chunk], hidden, gradient)
