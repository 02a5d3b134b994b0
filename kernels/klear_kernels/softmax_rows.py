"""The mathematics of a row of logits, written once for both operations.

With z the logits over the temperature, m their maximum, e_j = exp(z_j - m), and y the label:

    S = 1 + R                R: sum of e_j without the position of the maximum
    logsumexp = m + log1p(R)
    logprob   = (z_y - m) - log1p(R)
    1 - p_y   = (R - expm1(z_y - m)) / S
    entropy   = log1p(R) - sum_j e_j (z_j - m) / S

Every line adds terms of one sign, so nothing cancels: the log-probability and the gradient of a token whose
probability is nearly 1 keep full relative precision in float32, where the textbook `z_y - logsumexp` and
`p_y - 1` lose all of it once 1 - p_y falls below about 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import logits_into

_SLICES = 8
"""Temporaries of elementwise work are a chunk's logits divided by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """What is kept of each row when its logits are gone; all [K] in the compute dtype, equal on all shards.

    Attributes:
        reference: what exponents are taken relative to; m here, the largest logit over the temperature.
        log_sum: the log-sum-exp of the logits over the temperature, relative to the reference; log1p(R) here.
        label_complement: 1 - p_y.
        logprobs: log p_y.
        entropy: in nats, or None when not asked for.
    """

    reference: torch.Tensor
    log_sum: torch.Tensor
    label_complement: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None

    @property
    def logsumexp(self) -> torch.Tensor:
        return self.reference + self.log_sum

    def select(self, index: slice | torch.Tensor) -> RowStatistics:
        """The statistics of some of the rows."""
        entropy = None if self.entropy is None else self.entropy[index]
        return RowStatistics(
            reference=self.reference[index],
            log_sum=self.log_sum[index],
            label_complement=self.label_complement[index],
            logprobs=self.logprobs[index],
            entropy=entropy,
        )

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields in their order, for autograd to save."""
        return (self.reference, self.log_sum, self.label_complement, self.logprobs, self.entropy)

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor | None]) -> RowStatistics:
        """The statistics that `tensors` took apart."""
        names = ("reference", "log_sum", "label_complement", "logprobs", "entropy")
        return cls(**dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]

    @classmethod
    def empty(cls, problem: HeadProblem) -> RowStatistics:
        """Room for the K rows of a problem."""
        columns = [problem.hidden.new_empty(problem.num_rows, dtype=problem.compute_dtype) for _ in range(5)]
        return cls(
            reference=columns[0],
            log_sum=columns[1],
            label_complement=columns[2],
            logprobs=columns[3],
            entropy=columns[4] if problem.options.with_entropy else None,
        )

    @classmethod
    def of_sums(cls, row_max: torch.Tensor, sums: torch.Tensor, with_entropy: bool) -> RowStatistics:
        """The statistics of [C] row maxima and [4, C] sums, both over all shards.

        Rows of `sums`: R with all maxima but one per shard that holds some, how many were left out, z_y - m,
        sum e (z - m).
        """
        rest, count, label_gap, weighted = sums
        rest = rest + (count - 1.0)
        log_sum = torch.log1p(rest)
        return cls(
            reference=row_max,
            log_sum=log_sum,
            label_complement=(rest - torch.expm1(label_gap)) / (1.0 + rest),
            logprobs=label_gap - log_sum,
            entropy=log_sum - weighted / (1.0 + rest) if with_entropy else None,
        )

    def write(self, chunk: slice, part: RowStatistics) -> None:
        """Fill in the rows of a chunk."""
        for whole, piece in zip(self.tensors(), part.tensors(), strict=True):
            if whole is not None and piece is not None:
                whole[chunk] = piece


class LogitBuffer:
    """The one [C, valid_rows] block of logits that a call holds, used again for every chunk."""

    def __init__(self, problem: HeadProblem) -> None:
        self._problem = problem
        rows = max((chunk.stop - chunk.start for chunk in problem.chunks()), default=0)
        self._storage = problem.hidden.new_empty(rows, problem.weight.shape[0], dtype=problem.compute_dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the temperature of [C, H] hidden rows; overwrites the previous chunk."""
        return logits_into(self._storage[: hidden.shape[0]], hidden, self._problem)


def exponentiate_(logits: torch.Tensor, labels: torch.Tensor, problem: HeadProblem) -> RowStatistics:
    """Replace logits [C, valid_rows] over the temperature by exp(z - m) and return the rows' statistics.

    Args:
        logits: in the compute dtype, overwritten.
        labels: int64 [C], global word ids.
        problem: tells the shard, and whether entropy is wanted.
    """
    shard = problem.options.shard
    num_rows, has_words = logits.shape[0], logits.shape[1] > 0
    if has_words:
        top, top_column = logits.max(dim=1, keepdim=True)
        row_max = shard.max_(top.squeeze(1).clone())
    else:
        row_max = shard.max_(logits.new_full((num_rows,), float("-inf")))
    # Rows: R of this shard, how many maxima were left out of R, z_y - m, sum e (z - m).
    sums = logits.new_zeros(4, num_rows)
    if has_words:
        column, is_here = label_columns(labels, problem)
        label_logit = logits.gather(1, column).squeeze(1)
        sums[2] = torch.where(is_here, label_logit - row_max, 0.0)
        is_top = top.squeeze(1) == row_max  # equal maxima on two shards: each leaves one out, hence the count
        sums[1] = is_top
        for part in _row_slices(num_rows):
            sums[0, part], sums[3, part] = _exponentiate_part_(
                logits[part], row_max[part], top_column[part], is_top[part], problem.options.with_entropy
            )
    return RowStatistics.of_sums(row_max, shard.sum_(sums), problem.options.with_entropy)


def logprob_gradient_(
    exponentials: torch.Tensor, labels: torch.Tensor, rows: RowStatistics, grad: torch.Tensor, problem: HeadProblem
) -> torch.Tensor:
    """Replace exp(z - m) by the gradient of the raw logits, given d loss / d logprob [C].

    Equation: dz_j = g (1[j = y] - p_j) / temperature.
    """
    grad = grad / problem.options.temperature
    if exponentials.shape[1] > 0:
        exponentials.mul_((-grad * torch.exp(-rows.log_sum)).unsqueeze(1))
        set_label_columns_(exponentials, labels, label_gradient(rows, grad, None), problem)
    return exponentials


def row_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    rows: RowStatistics,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    problem: HeadProblem,
) -> torch.Tensor:
    """Replace recomputed logits over the temperature by the gradient of the raw logits.

    Equation: dz_j = [g (1[j = y] - p_j) - h p_j (log p_j + entropy)] / temperature, with g and h the
    upstream gradients [C] of logprob and entropy.
    """
    if logits.shape[1] == 0:
        return logits
    if grad_entropy is None or rows.entropy is None:
        for part in _row_slices(logits.shape[0]):
            logits[part].sub_(rows.reference[part].unsqueeze(1)).exp_()
        return logprob_gradient_(logits, labels, rows, grad_logprobs, problem)
    g, h = grad_logprobs / problem.options.temperature, grad_entropy / problem.options.temperature
    for part in _row_slices(logits.shape[0]):
        values = logits[part].sub_(rows.logsumexp[part].unsqueeze(1))
        probabilities = values.exp()
        values.add_(rows.entropy[part].unsqueeze(1)).mul_(-h[part].unsqueeze(1)).sub_(g[part].unsqueeze(1))
        values.mul_(probabilities)
    set_label_columns_(logits, labels, label_gradient(rows, g, h), problem)
    return logits


def label_gradient(rows: RowStatistics, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor | None) -> torch.Tensor:
    """Gradient [C] of the logit of each row's label, where 1 - p_y would cancel if it were subtracted.

    Equation: g (1 - p_y) - h p_y (log p_y + entropy).
    """
    at_label = grad_logprobs * rows.label_complement
    if grad_entropy is None or rows.entropy is None:
        return at_label
    return at_label - grad_entropy * torch.exp(rows.logprobs) * (rows.logprobs + rows.entropy)


def _exponentiate_part_(
    values: torch.Tensor, row_max: torch.Tensor, top_column: torch.Tensor, is_top: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """exp(z - m) in place; returns the sum without the maximum, and the sum of e (z - m)."""
    values.sub_(row_max.unsqueeze(1))
    weighted: torch.Tensor | float = 0.0
    if with_entropy:
        exponentials = values.exp()
        weighted = values.mul_(exponentials).sum(dim=1)
        values.copy_(exponentials)
    else:
        values.exp_()
    top = values.gather(1, top_column)
    values.scatter_(1, top_column, torch.where(is_top.unsqueeze(1), 0.0, top))
    rest = values.sum(dim=1)
    values.scatter_(1, top_column, top)
    return rest, weighted


def label_columns(labels: torch.Tensor, problem: HeadProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in this shard [C, 1] (some valid column elsewhere), and whether it is here [C]."""
    local = labels - problem.options.shard.start
    last = problem.options.shard.valid_rows - 1
    return local.clamp(0, last).unsqueeze(1), (local >= 0) & (local <= last)


def set_label_columns_(
    values: torch.Tensor, labels: torch.Tensor, at_label: torch.Tensor, problem: HeadProblem
) -> None:
    """Overwrite the label's column of each row of [C, valid_rows] by `at_label` [C], where the label is here."""
    if values.shape[1] == 0:
        return
    column, is_here = label_columns(labels, problem)
    kept = values.gather(1, column).squeeze(1)
    values.scatter_(1, column, torch.where(is_here, at_label.to(values.dtype), kept).unsqueeze(1))


def _row_slices(num_rows: int) -> list[slice]:
    rows = max(-(-num_rows // _SLICES), 1)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]
