"""Triton backend for bfloat16: no logits are stored going forward; going back, a chunk of their gradients is."""

from __future__ import annotations

import torch

from klear_kernels.head_problem import HeadProblem
from klear_kernels.head_products import HeadGradients
from klear_kernels.label_split_rows import rows_from_sums
from klear_kernels.linear_logprob.gradient_kernel import logit_gradient
from klear_kernels.linear_logprob.label_logit_kernel import label_logits
from klear_kernels.linear_logprob.statistics_kernel import NO_WORD, tile_statistics
from klear_kernels.softmax_rows import RowStatistics, label_columns, label_gradient, set_label_columns_
from klear_kernels.triton_tiles import HOPPER, LOG2_E, aligned

STATISTICS_BYTES = 64 << 20
"""Three float32 per row and tile are held until a chunk's tiles are put together."""

GRADIENT_BYTES = 2_500_000_000
"""bfloat16 values per row and word; large chunks keep the products after them at full speed."""

_LN_2 = 1.0 / LOG2_E
_STATISTICS_WORD_BYTES = 3 * 4 / HOPPER.words
_GRADIENT_WORD_BYTES = 2


class WordBuffer:
    """The one bfloat16 [C, valid_rows] matrix that a call holds, used again for every chunk."""

    def __init__(self, problem: HeadProblem) -> None:
        self._words = problem.weight.shape[0]
        rows = max((chunk.stop - chunk.start for chunk in gradient_chunks(problem)), default=0)
        self._storage = problem.hidden.new_empty(rows, -(-self._words // 8) * 8)  # rows start at multiples of 16 bytes

    def rows(self, count: int) -> torch.Tensor:
        """A [count, valid_rows] view; overwrites the previous chunk."""
        return self._storage[:count, : self._words]


def gradient_chunks(problem: HeadProblem) -> list[slice]:
    """Chunks of rows for which one bfloat16 value per word is held."""
    return problem.chunks(word_bytes=_GRADIENT_WORD_BYTES, budget_bytes=GRADIENT_BYTES)


def local_label_columns(problem: HeadProblem) -> torch.Tensor:
    """int32 [K] column of each row's label in this shard, -1 where it is in another."""
    columns, is_here = label_columns(problem.labels.index_select(0, problem.rows), problem)
    return torch.where(is_here, columns.squeeze(1), -1).int()


def all_label_logits(problem: HeadProblem, columns: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature [K] of the rows' labels, equal on all shards (one exchange)."""
    temperature = problem.options.temperature
    own = label_logits(problem.hidden, problem.weight, problem.rows, columns, temperature=temperature)
    return problem.options.shard.sum_(own)


def forward(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of the problem's K rows (2 K H V operations, no logits stored)."""
    rows = RowStatistics.empty(problem)
    columns = local_label_columns(problem)
    logits = all_label_logits(problem, columns)
    weight = aligned(problem.weight)
    for chunk in problem.chunks(word_bytes=_STATISTICS_WORD_BYTES, budget_bytes=STATISTICS_BYTES):
        part = _chunk_statistics(problem, problem.hidden_rows(chunk), weight, columns[chunk], logits[chunk])
        rows.write(chunk, part)
    return rows


def _chunk_statistics(
    problem: HeadProblem,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    logits: torch.Tensor,
) -> RowStatistics:
    """Statistics of a chunk: each tile's sums, brought to the largest maximum of all tiles of all shards."""
    shard, with_entropy = problem.options.shard, problem.options.with_entropy
    sums = logits.new_zeros(1 + with_entropy, logits.shape[0])
    if weight.shape[0] == 0:
        row_max = shard.max_(torch.full_like(logits, float("-inf")))
    else:
        maxima, tile_sums, tile_weighted = tile_statistics(
            hidden, weight, columns, temperature=problem.options.temperature, with_entropy=with_entropy
        )
        row_max = shard.max_(maxima.amax(0))
        empty = maxima <= NO_WORD
        gap = (maxima - row_max).masked_fill_(empty, 0.0)
        factor = torch.exp2(gap).masked_fill_(empty, 0.0)
        sums[0] = tile_sums.mul_(factor).sum(0)
        if with_entropy:
            sums[1] = tile_weighted.mul_(factor).addcmul_(tile_sums, gap).sum(0).mul_(_LN_2)
    shard.sum_(sums)
    # A vocabulary of one word has no maximum without its label.
    reference = torch.where(row_max <= NO_WORD, logits, row_max * _LN_2)
    return rows_from_sums(reference, sums[0], logits - reference, sums[1] if with_entropy else None)


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
        grad_logprobs, grad_entropy: upstream gradients [K], float32.
        gradients: takes the gradients.
    """
    temperature, weight = problem.options.temperature, aligned(problem.weight)
    buffer = WordBuffer(problem)
    for chunk in gradient_chunks(problem):
        hidden, part = problem.hidden_rows(chunk), rows.select(chunk)
        g, h = grad_logprobs[chunk], None if grad_entropy is None else grad_entropy[chunk]
        gradient = buffer.rows(hidden.shape[0])
        if weight.shape[0] > 0:
            logit_gradient(gradient, hidden, weight, part.logsumexp, g, h, part.entropy, temperature=temperature)
            at_label = label_gradient(part, g, h) / temperature
            set_label_columns_(gradient, problem.label_rows(chunk), at_label, problem)
        gradients.add(problem.rows[chunk], hidden, gradient)
