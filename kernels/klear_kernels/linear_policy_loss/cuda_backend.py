"""CUDA C++ backend for Hopper: cuBLAS products around one pass over each row of logits, written by hand.

Per chunk of C rows, in one [C, V_local] float32 buffer, with m the largest logit of a row *in this shard*:

    Z = X W^T / T            cuBLAS, bfloat16 operands, float32 result
    E = bf16(exp(Z - m))     row pass, in place, with m, the sums and the label's logit
    v = -(g / T) exp(m - logsumexp)            so that dZ / T = v E, but for the label's entry, which becomes
    E_y = -(1 - p_y) exp(logsumexp - m)        (1 - p_y) g / T, kept to full precision
    dX = v * (E W)           cuBLAS, float32 result
    dW += E^T bf16(v * X)    cuBLAS, added to the float32 sum by the product itself

m is measured, so no exponent can overflow, and no chunk is ever redone. It differs between the shards of a
vocabulary-parallel head, which costs nothing: v differs with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from klear_kernels import cuda_extension
from klear_kernels.chunking import chunk_slices
from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HiddenGradient
from klear_kernels.linear_policy_loss.policy_terms import PolicyTerms, token_losses
from klear_kernels.linear_policy_loss.torch_backend import PolicyRows
from klear_kernels.softmax_rows import RowStatistics, set_label_columns_

GRADIENT_CHUNK_BYTES = 2_500_000_000
"""Of logits, where gradients are formed: each chunk reads and writes the whole float32 gradient of the weight once."""

STATISTICS_CHUNK_BYTES = 250_000_000
"""Of logits, where none are."""

_COLUMN_MULTIPLE = 64
"""Rows of the buffer start at multiples of 256 bytes."""

_LOWEST_REFERENCE = -60.0
"""m - logsumexp is held above this. A shard whose largest logit lies further below the whole vocabulary's
log-sum-exp has probabilities under exp(-60); they are overstated to that, and E_y stays finite in bfloat16."""


class _Rows:
    """The buffer that holds a chunk's logits, then its exponentials."""

    def __init__(self, problem: HeadProblem, chunks: list[slice]) -> None:
        self._extension = cuda_extension.extension()
        self._problem = problem
        self.words = problem.weight.shape[0]
        if self.words > self._extension.max_words:
            raise ValueError(
                f"backend: got 'cuda' for {self.words} words per shard, it holds a row of "
                f"{self._extension.max_words} at most; split the vocabulary over more ranks or take another backend"
            )
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        columns = -(-self.words // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
        self._storage = problem.hidden.new_empty(rows, columns, dtype=torch.float32)

    def load(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fill with the logits over the temperature of [C, H] hidden rows; returns the [C, columns] buffer."""
        rows = self._storage[: hidden.shape[0]]
        if self.words > 0:
            self._extension.logits_product(rows, hidden, self._problem.weight, 1.0 / self._problem.options.temperature)
        return rows

    def reduce(self, rows: torch.Tensor, labels: torch.Tensor, write: bool) -> tuple[RowStatistics, torch.Tensor]:
        """Statistics of the rows over all shards, and m - logsumexp [C] with m this shard's maximum.

        With `write`, exponentials replace the logits.
        """
        shard = self._problem.options.shard
        sums = rows.new_zeros(4, rows.shape[0])  # as in softmax_rows: R, maxima left out, z_y - m, sum e (z - m)
        if self.words == 0:
            row_max = shard.max_(rows.new_full((rows.shape[0],), float("-inf")))
            behind = torch.full_like(row_max, float("-inf"))
        else:
            local = labels - shard.start
            local = torch.where((local >= 0) & (local < self.words), local, -1)
            own_max, label_gap, partials = self._extension.row_pass(rows, self.words, local, write)
            row_max = shard.max_(own_max.clone())
            behind = own_max - row_max
            rest, count, weighted = partials.sum(dim=1).unbind(dim=1)
            rest = rest + (count - 1.0)  # this shard's, without one of its maxima
            is_top, scale = own_max == row_max, torch.exp(behind)
            sums[0] = torch.where(is_top, rest, scale * (1.0 + rest))
            sums[1] = is_top
            sums[2] = torch.where(local >= 0, label_gap + behind, 0.0)
            sums[3] = torch.where(is_top, weighted, scale * (weighted + behind * (1.0 + rest)))
        statistics = RowStatistics.of_sums(row_max, shard.sum_(sums), self._problem.options.with_entropy)
        return statistics, behind - statistics.log_sum


class _Gradients:
    """Collects the wanted gradients chunk by chunk."""

    def __init__(self, problem: HeadProblem, *, for_hidden: bool, for_weight: bool) -> None:
        self._extension = cuda_extension.extension()
        self._problem = problem
        self._hidden = HiddenGradient(problem) if for_hidden else None
        shape = (problem.options.shard.rows, problem.weight.shape[1])
        self._weight = problem.weight.new_zeros(shape, dtype=torch.float32) if for_weight else None

    @property
    def wanted(self) -> bool:
        return self._hidden is not None or self._weight is not None

    def add(
        self, chunk: slice, rows: torch.Tensor, part: RowStatistics, reference: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Add a chunk, given its buffer of exponentials, m - logsumexp [C] and d loss / d logprob [C]."""
        weight = self._problem.weight
        words = weight.shape[0]
        if words == 0:
            if self._hidden is not None:  # the other shards wait for this one's part
                self._hidden.add_rows(chunk, rows.new_zeros(rows.shape[0], weight.shape[1]))
            return
        reference = reference.clamp(min=_LOWEST_REFERENCE)
        at_label = -part.label_complement * torch.exp(-reference)
        exponentials = rows.view(torch.bfloat16)[:, :words]
        set_label_columns_(exponentials, self._problem.label_rows(chunk), at_label.bfloat16(), self._problem)
        scale = (-grad / self._problem.options.temperature * torch.exp(reference)).unsqueeze(1)
        if self._hidden is not None:
            self._hidden.add_rows(chunk, self._extension.hidden_product(rows, weight).mul_(scale))
        if self._weight is not None:
            scaled_hidden = (self._problem.hidden_rows(chunk) * scale).bfloat16()
            self._extension.add_weight_product(self._weight[:words], rows, scaled_hidden)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of hidden states and weight, in the input dtype."""
        return (
            None if self._hidden is None else self._hidden.finish(),
            None if self._weight is None else self._weight.to(self._problem.weight.dtype),
        )


def statistics(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of rows that carry no loss (2 K H V operations)."""
    problem = _contiguous(problem)
    chunks = _chunks(problem, STATISTICS_CHUNK_BYTES)
    result, buffer = RowStatistics.empty(problem), _Rows(problem, chunks)
    for chunk in chunks:
        rows = buffer.load(problem.hidden_rows(chunk))
        result.write(chunk, buffer.reduce(rows, problem.label_rows(chunk), write=False)[0])
    return result


def forward(problem: HeadProblem, terms: PolicyTerms, *, for_hidden: bool, for_weight: bool) -> PolicyRows:
    """Compute losses and the wanted gradients in one pass over the chunks (6 K H V operations for both).

    Args:
        problem: the K rows, bfloat16.
        terms: of those K rows, in float32.
        for_hidden, for_weight: which gradients are wanted.
    """
    problem = _contiguous(problem)
    gradients = _Gradients(problem, for_hidden=for_hidden, for_weight=for_weight)
    chunks = _chunks(problem, GRADIENT_CHUNK_BYTES if gradients.wanted else STATISTICS_CHUNK_BYTES)
    result, buffer = RowStatistics.empty(problem), _Rows(problem, chunks)
    policy_loss, lm_loss = torch.empty_like(result.logprobs), torch.empty_like(result.logprobs)
    for chunk in chunks:
        rows = buffer.load(problem.hidden_rows(chunk))
        part, reference = buffer.reduce(rows, problem.label_rows(chunk), write=gradients.wanted)
        result.write(chunk, part)
        policy_loss[chunk], lm_loss[chunk], grad = token_losses(
            part.logprobs, terms.select(chunk, problem.compute_dtype)
        )
        if gradients.wanted:
            gradients.add(chunk, rows, part, reference, grad)
    grad_hidden, grad_weight = gradients.finish()
    return PolicyRows(
        rows=result, policy_loss=policy_loss, lm_loss=lm_loss, grad_hidden=grad_hidden, grad_weight=grad_weight
    )


def _contiguous(problem: HeadProblem) -> HeadProblem:
    return replace(problem, hidden=problem.hidden.contiguous(), weight=problem.weight.contiguous())


def _chunks(problem: HeadProblem, budget_bytes: int) -> list[slice]:
    """Slices of the rows, equal on all tensor-parallel ranks."""
    vocab_rows = problem.options.shard.rows
    wanted = problem.options.chunk_tokens
    return chunk_slices(
        problem.num_rows,
        vocab_rows=vocab_rows,
        element_bytes=4,
        device=problem.hidden.device,
        chunk_tokens=max(budget_bytes // (4 * vocab_rows), 1) if wanted is None else wanted,
    )
