"""Chunked PyTorch backend: any device, any process group; the path every other backend is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HiddenGradient, WeightGradient
from klear_kernels.linear_logprob import torch_backend as logprob_backend
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from klear_kernels.softmax_rows import LogitBuffer, RowStatistics, exponentiate_, logprob_gradient_


class PolicyRows(NamedTuple):
    """Results of the problem's K rows, in the compute dtype, and the gradients of the summed loss.

    Attributes:
        rows: statistics of the K rows.
        policy_loss, lm_loss: weighted losses [K].
        grad_hidden: [T, H] ([T / tp, H] when sequence-parallel) in the input dtype, or None.
        grad_weight: [V_local, H] in the input dtype, or None.
    """

    rows: RowStatistics
    policy_loss: torch.Tensor
    lm_loss: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None


def statistics(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of rows that carry no loss."""
    return logprob_backend.forward(problem)


def forward(problem: HeadProblem, terms: PolicyTerms, *, for_hidden: bool, for_weight: bool) -> PolicyRows:
    """Compute losses and the wanted gradients in one pass over the chunks (6 K H V operations for both).

    Args:
        problem: the K rows.
        terms: of those K rows, in the compute dtype.
        for_hidden, for_weight: which gradients are wanted.
    """
    rows = RowStatistics.empty(problem)
    policy_loss, lm_loss = torch.empty_like(rows.logprobs), torch.empty_like(rows.logprobs)
    hidden_gradient = HiddenGradient(problem) if for_hidden else None
    weight_gradient = WeightGradient(problem) if for_weight else None
    buffer = LogitBuffer(problem)
    for chunk in problem.chunks():
        hidden, labels = problem.hidden_rows(chunk), problem.label_rows(chunk)
        exponentials = buffer.logits(hidden)
        part = exponentiate_(exponentials, labels, problem)
        rows.write(chunk, part)
        policy_loss[chunk], lm_loss[chunk], grad = token_losses(
            part.logprobs, terms.select(chunk, problem.compute_dtype)
        )
        if hidden_gradient is None and weight_gradient is None:
            continue
        gradient = logprob_gradient_(exponentials, labels, part, grad, problem)
        if hidden_gradient is not None:
            hidden_gradient.add(chunk, gradient)
        if weight_gradient is not None:
            weight_gradient.add(hidden, gradient)
    return PolicyRows(
        rows=rows,
        policy_loss=policy_loss,
        lm_loss=lm_loss,
        grad_hidden=None if hidden_gradient is None else hidden_gradient.finish(),
        grad_weight=None if weight_gradient is None else weight_gradient.finish(),
    )
