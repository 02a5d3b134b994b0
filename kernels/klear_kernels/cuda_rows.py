"""A chunk of rows on the CUDA backend: logits by cuBLAS, then one pass over each row by csrc/row_pass.cu.

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
from klear_kernels.head_products import HeadGradients
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


def contiguous(problem: HeadProblem) -> HeadProblem:
    """The problem with the memory layout that the compiled part takes."""
    return replace(problem, hidden=problem.hidden.contiguous(), weight=problem.weight.contiguous())


def cuda_chunks(problem: HeadProblem, budget_bytes: int) -> list[slice]:
    """Slices of the rows, equal on all tensor-parallel ranks."""
    return chunk_slices(
        problem.num_rows,
        vocab_rows=problem.options.shard.rows,
        word_bytes=4,
        device=problem.hidden.device,
        chunk_tokens=problem.options.chunk_tokens,
        budget_bytes=budget_bytes,
    )


class CudaRows:
    """The buffer that holds a chunk's logits, then its exponentials, again for every chunk."""

    def __init__(self, problem: HeadProblem, chunks: list[slice]) -> None:
        """Make room for the largest of the chunks.

        Raises:
            ValueError: a row has more words than fit the registers of a cluster.
        """
        self._extension = cuda_extension.extension()
        self._problem = problem
        self._words = problem.weight.shape[0]
        if self._words > self._extension.max_words:
            raise ValueError(
                f"backend: got 'cuda' for {self._words} words per shard, it holds a row of "
                f"{self._extension.max_words} at most; split the vocabulary over more ranks or take another backend"
            )
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        columns = -(-self._words // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
        self._storage = problem.hidden.new_empty(rows, columns, dtype=torch.float32)

    def load(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fill with the logits over the temperature of [C, H] hidden rows; returns the [C, columns] buffer."""
        rows = self._storage[: hidden.shape[0]]
        if self._words > 0:
            self._extension.logits_product(rows, hidden, self._problem.weight, 1.0 / self._problem.options.temperature)
        return rows

    def reduce(self, rows: torch.Tensor, labels: torch.Tensor, write: bool) -> tuple[RowStatistics, torch.Tensor]:
        """Statistics of the rows over all shards, and m - logsumexp [C] with m this shard's maximum.

        With `write`, exponentials replace the logits.
        """
        shard = self._problem.options.shard
        sums = rows.new_zeros(4, rows.shape[0])  # as `RowStatistics.of_sums` takes them
        if self._words == 0:
            row_max = shard.max_(rows.new_full((rows.shape[0],), float("-inf")))
            behind = torch.full_like(row_max, float("-inf"))
        else:
            local = labels - shard.start
            local = torch.where((local >= 0) & (local < self._words), local, -1)
            own_max, label_gap, partials = self._extension.row_pass(rows, self._words, local, write)
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

    def factors(
        self, rows: torch.Tensor, labels: torch.Tensor, part: RowStatistics, reference: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the raw logits as a bfloat16 [C, words] matrix E and a factor v [C] for each of its rows.

        Args:
            rows: the buffer after `reduce` wrote it; its label entries are replaced.
            labels: int64 [C], global word ids.
            part, reference: what `reduce` returned.
            grad: d loss / d logprob [C].
        """
        reference = reference.clamp(min=_LOWEST_REFERENCE)
        exponentials = rows.view(torch.bfloat16)[:, : self._words]
        at_label = -part.label_complement * torch.exp(-reference)
        set_label_columns_(exponentials, labels, at_label, self._problem)
        return exponentials, -grad / self._problem.options.temperature * torch.exp(reference)

    def add_gradients(
        self, gradients: HeadGradients, chunk: slice, hidden: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Add a chunk to the wanted gradients by the products of csrc/products.cpp, given v from `factors`."""
        if self._words == 0:
            if gradients.hidden is not None:  # the other shards wait for this one's part
                gradients.hidden.put(self._problem.rows[chunk], rows.new_zeros(hidden.shape))
            return
        scale, store = scale.unsqueeze(1), None
        if gradients.hidden is not None:
            part = self._extension.hidden_product(rows, self._problem.weight).mul_(scale)
            store = gradients.hidden.start(self._problem.rows[chunk], part)
        if gradients.weight is not None:  # while the shards exchange the hidden states' gradient
            scaled = torch.mul(hidden, scale, out=torch.empty_like(hidden))
            self._extension.add_weight_product(gradients.weight.words, rows, scaled)
        if store is not None:
            store()


def cuda_statistics(problem: HeadProblem) -> RowStatistics:
    """Compute the statistics of the problem's rows (2 K H V operations)."""
    problem = contiguous(problem)
    chunks = cuda_chunks(problem, STATISTICS_CHUNK_BYTES)
    result, buffer = RowStatistics.empty(problem), CudaRows(problem, chunks)
    for chunk in chunks:
        rows = buffer.load(problem.hidden_rows(chunk))
        result.write(chunk, buffer.reduce(rows, problem.label_rows(chunk), write=False)[0])
    return result
