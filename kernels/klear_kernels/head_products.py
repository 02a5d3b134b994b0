"""The three products of the head, one chunk of rows at a time, with sums in at least float32.

bfloat16 operands are multiplied into float32 results: by the device's own mixed-precision product where
torch offers one, else on float32 copies of one block of the weight at a time. Logits rounded to bfloat16
would be off by about 0.1 nats at the usual scale, which an importance ratio does not forgive.
"""

from __future__ import annotations

import functools

import torch

from klear_kernels.head_problem import HeadProblem

_CAST_BYTES = 32 << 20
"""Size of the widened copy of a block of the weight."""

_MIXED_BLOCK_ROWS = 16384
"""Words per mixed-precision product: bounds its result before it is added where it belongs."""


@functools.cache
def has_mixed_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies `dtype` matrices into float32 on this device without rounding in between."""
    if device_type == "cpu" or dtype != torch.bfloat16:
        return False
    try:
        probe = torch.ones(16, 16, dtype=dtype, device=device_type)
        return mixed_product(probe, probe).dtype == torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def mixed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[A, B] @ [B, C] of bfloat16 operands with a float32 result."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _weight_blocks(weight: torch.Tensor, dtype: torch.dtype, mixed: bool) -> list[slice]:
    rows = _MIXED_BLOCK_ROWS if mixed else max(_CAST_BYTES // (max(weight.shape[1], 1) * dtype.itemsize), 1)
    return [slice(start, min(start + rows, weight.shape[0])) for start in range(0, weight.shape[0], rows)]


def logits_into(out: torch.Tensor, hidden: torch.Tensor, problem: HeadProblem) -> torch.Tensor:
    """Write the logits over the temperature, [C, valid_rows] in the compute dtype, of [C, H] hidden rows."""
    weight = problem.weight
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif has_mixed_products(weight.device.type, weight.dtype):
        for block in _weight_blocks(weight, out.dtype, mixed=True):
            out[:, block] = mixed_product(hidden, weight[block].t())
    else:
        hidden = hidden.to(out.dtype)
        for block in _weight_blocks(weight, out.dtype, mixed=False):
            out[:, block] = hidden @ weight[block].to(out.dtype).t()
    if problem.options.temperature != 1.0:
        out.div_(problem.options.temperature)
    return out


class HiddenGradient:
    """Collects d loss / d hidden chunk by chunk, and leaves it as the hidden states came in.

    Without sequence parallelism each chunk is summed over the vocabulary shards in the compute dtype and
    stored in the input dtype; with it, all chunks are reduce-scattered once at the end.
    """

    def __init__(self, problem: HeadProblem) -> None:
        self._problem = problem
        self._scatter_at_end = problem.options.shard.sequence_parallel and problem.options.shard.size > 1
        dtype = problem.compute_dtype if self._scatter_at_end else problem.hidden.dtype
        # Zeros, not empty: tokens that are not computed have an exact zero gradient.
        self._gradient = torch.zeros_like(problem.hidden, dtype=dtype, memory_format=torch.contiguous_format)

    def add(self, chunk: slice, logit_gradient: torch.Tensor) -> None:
        """Add the rows of a chunk, given [C, valid_rows] gradients of the raw logits in the compute dtype."""
        self.add_rows(chunk, self._product(logit_gradient))

    def add_rows(self, chunk: slice, rows: torch.Tensor) -> None:
        """Add the rows of a chunk, given this shard's part of them, [C, H] in the compute dtype; may overwrite it."""
        if not self._scatter_at_end:
            self._problem.options.shard.sum_(rows)
        self._gradient.index_copy_(0, self._problem.rows[chunk], rows.to(self._gradient.dtype))

    def _product(self, logit_gradient: torch.Tensor) -> torch.Tensor:
        weight = self._problem.weight
        if weight.dtype == logit_gradient.dtype:
            return logit_gradient @ weight
        mixed = has_mixed_products(weight.device.type, weight.dtype)
        rows = logit_gradient.new_zeros(logit_gradient.shape[0], weight.shape[1])
        for block in _weight_blocks(weight, logit_gradient.dtype, mixed):
            if mixed:
                rows += mixed_product(logit_gradient[:, block].to(weight.dtype), weight[block])
            else:
                rows.addmm_(logit_gradient[:, block], weight[block].to(logit_gradient.dtype))
        return rows

    def finish(self) -> torch.Tensor:
        """Return [T, H] ([T / tp, H] when sequence-parallel) in the input dtype."""
        if self._scatter_at_end:
            self._gradient = self._problem.options.shard.reduce_scatter_tokens(self._gradient)
        return self._gradient.to(self._problem.hidden.dtype)


class WeightGradient:
    """Sums d loss / d weight over chunks in the compute dtype; the one owner of that accumulator.

    Local to the shard. Rows of the padded vocabulary stay exactly zero.
    """

    def __init__(self, problem: HeadProblem) -> None:
        self._problem = problem
        self._sum = torch.zeros(
            problem.options.shard.rows,
            problem.weight.shape[1],
            dtype=problem.compute_dtype,
            device=problem.weight.device,
        )

    def add(self, hidden: torch.Tensor, logit_gradient: torch.Tensor) -> None:
        """Add a chunk, given its [C, H] hidden rows and [C, valid_rows] gradients of the raw logits."""
        weight = self._problem.weight
        valid = self._sum[: weight.shape[0]]
        if has_mixed_products(weight.device.type, weight.dtype):
            for block in _weight_blocks(weight, logit_gradient.dtype, mixed=True):
                valid[block] += mixed_product(logit_gradient[:, block].to(weight.dtype).t(), hidden)
        else:
            valid.addmm_(logit_gradient.t(), hidden.to(logit_gradient.dtype))

    def finish(self) -> torch.Tensor:
        """Return [V_local, H] in the weight's dtype."""
        return self._sum.to(self._problem.weight.dtype)
