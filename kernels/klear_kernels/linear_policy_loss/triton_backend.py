"""Triton backend for bfloat16: losses and both gradients from one look at the logits (6 K H V operations).

Equation: with E_j = exp(z_j - r) and S = sum_j E_j, the gradient of the raw logits is v E_j for j != y, and
v (-(1 - p_y) S) at the label, where v = -g / (temperature S). Hence dX = v (E @ W) and dW = E^T @ (v X) with one
number v per row, which need not be known when E is written.

The reference r comes before the product: the label's logit minus the old log-probability is the log-sum-exp under
the old policy, to which the new one is near. Rows for which it was not (`REFERENCE_RANGE`) take no part in these
products and are computed again with their measured log-sum-exp.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
from klear_kernels.label_split_rows import rows_from_sums
from klear_kernels.linear_logprob import triton_backend as logprob_backend
from klear_kernels.linear_policy_loss.exponent_kernel import exponentials_and_sums
from klear_kernels.linear_policy_loss.policy_rows import PolicyRows
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from klear_kernels.softmax_rows import RowStatistics, set_label_columns_
from klear_kernels.triton_tiles import aligned

REFERENCE_RANGE = 30.0
"""Most nats between a reference and the log-sum-exp. Within it no exponential overflows, what underflows is below
exp(-57) of the sum, and v stays far inside the range of bfloat16 for any sensible gradient."""

_LEAST_OLD_LOGPROB = -REFERENCE_RANGE / 2
"""Old log-probabilities are believed down to here: a token that has become certain since is then still in range."""

Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    """Compute losses and the wanted gradients.

    One number is read back from the device per call, after all chunks: how many rows are to be computed again. It
    follows from sums over all shards, so that all ranks of the group agree on it.

    Args:
        problem: the K rows.
        terms: of those K rows, float32.
        for_hidden, for_weight: which gradients are wanted.
        main_grad: where the weight's gradient is added, or None to return it.
    """
    gradients = HeadGradients(problem, for_hidden=for_hidden, for_weight=for_weight, main_grad=main_grad)
    if not gradients.wanted:
        rows = statistics(problem)
        return PolicyRows.of(rows, token_losses(rows.logprobs, terms), (None, None))
    rows, losses, in_range = _referenced_pass(problem, terms, gradients)
    outside = (~in_range).nonzero().squeeze(1)
    if outside.shape[0]:
        _measured_pass(problem, terms, gradients, outside, rows, losses)
    return PolicyRows.of(rows, losses, gradients.finish())


def _reference(logits: torch.Tensor, terms: PolicyTerms) -> torch.Tensor:
    """r [K]; where there is no old log-probability to go by, the label's logit, right to within -log p_y."""
    old = torch.where(terms.policy_weight.ne(0), terms.old_logprobs, 0.0)
    return logits - torch.nan_to_num(old, nan=0.0, neginf=0.0).clamp(_LEAST_OLD_LOGPROB, 0.0)


def _referenced_pass(
    problem: HeadProblem, terms: PolicyTerms, gradients: HeadGradients
) -> tuple[RowStatistics, Losses, torch.Tensor]:
    """Statistics, losses and gradients of all rows whose reference holds, and bool [K] which these are."""
    rows = RowStatistics.empty(problem)
    losses = (torch.empty_like(rows.logprobs), torch.empty_like(rows.logprobs), torch.empty_like(rows.logprobs))
    in_range = torch.empty_like(rows.logprobs, dtype=torch.bool)
    columns = logprob_backend.local_label_columns(problem)
    logits = logprob_backend.all_label_logits(problem, columns)
    reference = _reference(logits, terms)
    weight = aligned(problem.weight)
    buffer = logprob_backend.WordBuffer(problem)
    for chunk in logprob_backend.gradient_chunks(problem):
        hidden = problem.hidden_rows(chunk)
        exponentials = buffer.rows(hidden.shape[0])
        part = _exponentiate(
            problem, exponentials, hidden, weight, columns[chunk], reference[chunk], (logits - reference)[chunk]
        )
        part_losses = token_losses(part.logprobs, terms.select(chunk, problem.compute_dtype))
        valid = part.log_sum.abs() <= REFERENCE_RANGE
        at_label = torch.where(valid, -part.label_complement * torch.exp(part.log_sum), 0.0)
        set_label_columns_(exponentials, problem.label_rows(chunk), at_label, problem)
        scale = -part_losses[2] / problem.options.temperature * torch.exp(-part.log_sum)
        gradients.add(problem.rows[chunk], hidden, exponentials, torch.where(valid, scale, 0.0))
        rows.write(chunk, part)
        in_range[chunk] = valid
        for whole, piece in zip(losses, part_losses, strict=True):
            whole[chunk] = piece
    return rows, losses, in_range


def _exponentiate(
    problem: HeadProblem,
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    reference: torch.Tensor,
    label_gap: torch.Tensor,
) -> RowStatistics:
    """Write a chunk's exponentials and return its statistics (one exchange of two numbers per row)."""
    with_entropy = problem.options.with_entropy
    sums = reference.new_zeros(1 + with_entropy, reference.shape[0])
    if weight.shape[0] > 0:
        own = exponentials_and_sums(
            out,
            hidden,
            weight,
            columns,
            reference,
            temperature=problem.options.temperature,
            with_entropy=with_entropy,
        )
        for whole, piece in zip(sums, own, strict=False):
            whole.copy_(piece)
    problem.options.shard.sum_(sums)
    return rows_from_sums(reference, sums[0], label_gap, sums[1] if with_entropy else None)


def _measured_pass(
    problem: HeadProblem,
    terms: PolicyTerms,
    gradients: HeadGradients,
    outside: torch.Tensor,
    rows: RowStatistics,
    losses: Losses,
) -> None:
    """Compute the rows `outside`, int64 indices into the K, again from their measured log-sum-exp; fill them in."""
    again = replace(problem, rows=problem.rows[outside])
    part = logprob_backend.forward(again)
    part_losses = token_losses(part.logprobs, terms.select(outside, problem.compute_dtype))
    logprob_backend.backward(again, part, part_losses[2], None, gradients)
    for whole, piece in zip((*rows.tensors(), *losses), (*part.tensors(), *part_losses), strict=True):
        if whole is not None and piece is not None:
            whole[outside] = piece
