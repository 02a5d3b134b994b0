"""Chunked PyTorch backend: any device, any process group; the path every other backend is compared with."""

from __future__ import annotations

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
from klear_kernels.linear_logprob import torch_backend as logprob_backend
from klear_kernels.linear_policy_loss.policy_rows import PolicyRows
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from klear_kernels.softmax_rows import LogitBuffer, RowStatistics, exponentiate_, logprob_gradient_


def statistics(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of rows that carry no loss."""
    return logprob_backend.forward(problem)


def forward(
    problem: HeadProblem,
    terms: PolicyTerms,
    *,
    for_hidden: bool,
    for_weight: bool,
    main_grad: torch.Tensor | None = None,
) -> PolicyRows:
    """Compute losses and the wanted gradients in one pass over the chunks (6 K H V operations for both).

    Args:
        problem: the K rows.
        terms: of those K rows, in the compute dtype.
        for_hidden, for_weight: which gradients are wanted.
        main_grad: where the weight's gradient is added, or None to return it.
    """
    rows = RowStatistics.empty(problem)
    losses = (torch.empty_like(rows.logprobs), torch.empty_like(rows.logprobs), torch.empty_like(rows.logprobs))
    gradients = HeadGradients(problem, for_hidden=for_hidden, for_weight=for_weight, main_grad=main_grad)
    buffer = LogitBuffer(problem)
    for chunk in problem.chunks():
        hidden, labels = problem.hidden_rows(chunk), problem.label_rows(chunk)
        exponentials = buffer.logits(hidden)
        part = exponentiate_(exponentials, labels, problem)
        rows.write(chunk, part)
        part_losses = token_losses(part.logprobs, terms.select(chunk, problem.compute_dtype))
        for whole, piece in zip(losses, part_losses, strict=True):
            whole[chunk] = piece
        if gradients.wanted:
            gradient = logprob_gradient_(exponentials, labels, part, part_losses[2], problem)
            gradients.add(problem.rows[chunk], hidden, gradient)
    return PolicyRows.of(rows, losses, gradients.finish())
