"""The three products of the head, one chunk of rows at a time, with sums in at least float32.

bfloat16 operands are multiplied into float32 results: by the device's own mixed-precision product where
torch offers one, else on float32 copies of one block of the weight at a time. Logits rounded to bfloat16
would be off by about 0.1 nats at the usual scale, which an importance ratio does not forgive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from klear_kernels.head_problem import HeadProblem

_CAST_BYTES = 32 << 20
"""Size of the widened copy of a block of the weight."""

_MIXED_BLOCK_ROWS = 16384
"""Words per mixed-precision product where a copy is made: of float32 gradients, or of a result to be added."""


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


@functools.cache
def has_mixed_accumulation(device_type: str) -> bool:
    """Whether torch adds a product of bfloat16 matrices to a float32 one in place; older releases refuse."""
    try:
        total = torch.ones(16, 16, device=device_type)
        probe = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
        add_mixed_product_(total, probe, probe)
        return bool((total == 17.0).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def mixed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[A, B] @ [B, C] of bfloat16 operands with a float32 result."""
    return torch.mm(left, right, out_dtype=torch.float32)


def add_mixed_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add [A, B] @ [B, C] of bfloat16 operands to the float32 `total` [A, C] in place."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


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


def hidden_product(logit_gradient: torch.Tensor, problem: HeadProblem) -> torch.Tensor:
    """[C, valid_rows] gradients of the logits times the weight: [C, H] in the compute dtype.

    Args:
        logit_gradient: in the compute dtype, or already rounded to the weight's.
        problem: tells the weight.
    """
    weight, dtype = problem.weight, problem.compute_dtype
    if weight.dtype == dtype:
        return logit_gradient @ weight
    mixed = has_mixed_products(weight.device.type, weight.dtype)
    if mixed and logit_gradient.dtype == weight.dtype:
        return mixed_product(logit_gradient, weight)
    rows = torch.zeros(logit_gradient.shape[0], weight.shape[1], dtype=dtype, device=weight.device)
    for block in _weight_blocks(weight, dtype, mixed):
        if mixed:
            rows += mixed_product(logit_gradient[:, block].to(weight.dtype), weight[block])
        else:
            rows.addmm_(logit_gradient[:, block].to(dtype), weight[block].to(dtype))
    return rows


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

    def start(self, tokens: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
        """Begin the exchange of this shard's gradient of some tokens; call what is returned to store the sum.

        Args:
            tokens: int64 [C], positions in the sequence.
            rows: [C, H] in the compute dtype; overwritten.
        """
        summed = (lambda: None) if self._scatter_at_end else self._problem.options.shard.start_sum_(rows)

        def store() -> None:
            summed()
            self._gradient.index_copy_(0, tokens, rows.to(self._gradient.dtype))

        return store

    def put(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """`start` and wait for the exchange at once."""
        self.start(tokens, rows)()

    def finish(self) -> torch.Tensor:
        """Return [T, H] ([T / tp, H] when sequence-parallel) in the input dtype."""
        if self._scatter_at_end:
            self._gradient = self._problem.options.shard.reduce_scatter_tokens(self._gradient)
        return self._gradient.to(self._problem.hidden.dtype)


class WeightGradient:
    """Sums d loss / d weight over chunks in the compute dtype; the one owner of that accumulator.

    Local to the shard. Rows of the padded vocabulary are not touched: they stay zero, or what `main_grad` held.
    """

    def __init__(self, problem: HeadProblem, main_grad: torch.Tensor | None = None) -> None:
        """Start from zero, or from `main_grad` [V_local, H] in the compute dtype, which is then added to in place."""
        self._problem = problem
        self._is_main_grad = main_grad is not None
        if main_grad is None:
            shape = (problem.options.shard.rows, problem.weight.shape[1])
            main_grad = torch.zeros(shape, dtype=problem.compute_dtype, device=problem.weight.device)
        self._sum = main_grad

    @property
    def words(self) -> torch.Tensor:
        """The sum's rows that are words, [valid_rows, H], for a backend that adds to them by itself."""
        return self._sum[: self._problem.weight.shape[0]]

    def add(self, hidden: torch.Tensor, logit_gradient: torch.Tensor) -> None:
        """Add the product of a chunk's [C, valid_rows] gradients of the logits with its [C, H] hidden rows.

        Args:
            hidden: in the input dtype.
            logit_gradient: in the compute dtype, or already rounded to the input dtype.
        """
        weight, valid = self._problem.weight, self.words
        if not has_mixed_products(weight.device.type, weight.dtype):
            valid.addmm_(logit_gradient.t().to(valid.dtype), hidden.to(valid.dtype))
            return
        in_place = has_mixed_accumulation(weight.device.type)
        if in_place and logit_gradient.dtype == weight.dtype:
            add_mixed_product_(valid, logit_gradient.t(), hidden)
            return
        for block in _weight_blocks(weight, valid.dtype, mixed=True):
            left = logit_gradient[:, block].to(weight.dtype).t()
            if in_place:
                add_mixed_product_(valid[block], left, hidden)
            else:
                valid[block] += mixed_product(left, hidden)

    def finish(self) -> torch.Tensor | None:
        """Return [V_local, H] in the weight's dtype, or None where it went into `main_grad`."""
        return None if self._is_main_grad else self._sum.to(self._problem.weight.dtype)


class HeadGradients:
    """The wanted ones of the two gradients, fed with the gradients of the logits chunk by chunk.

    Attributes:
        hidden, weight: collects the gradient, None where it is not wanted.
    """

    def __init__(
        self, problem: HeadProblem, *, for_hidden: bool, for_weight: bool, main_grad: torch.Tensor | None = None
    ) -> None:
        """Make room for what is wanted.

        Args:
            problem: tells shapes, dtypes and the shard.
            for_hidden, for_weight: which gradients are wanted.
            main_grad: [V_local, H] in the compute dtype that the weight's gradient is added to, or None to return it.
        """
        self._problem = problem
        self.hidden = HiddenGradient(problem) if for_hidden else None
        self.weight = WeightGradient(problem, main_grad) if for_weight else None

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def add(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        logit_gradient: torch.Tensor,
        row_scale: torch.Tensor | None = None,
    ) -> None:
        """Take in a chunk.

        Args:
            tokens: int64 [C], positions in the sequence, none given before.
            hidden: [C, H] in the input dtype.
            logit_gradient: [C, valid_rows] of the raw logits, in the compute dtype or rounded to the input dtype.
            row_scale: [C] in the compute dtype, a factor that each row of `logit_gradient` still lacks.
        """
        store = None
        if self.hidden is not None:
            rows = hidden_product(logit_gradient, self._problem)
            if row_scale is not None:
                rows.mul_(row_scale.unsqueeze(1))
            store = self.hidden.start(tokens, rows)
        if self.weight is not None:  # while the shards exchange the hidden states' gradient
            if row_scale is not None:
                hidden = torch.mul(hidden, row_scale.unsqueeze(1), out=torch.empty_like(hidden))
            self.weight.add(hidden, logit_gradient)
        if store is not None:
            store()

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden states and weight in the input dtype; None for what was not wanted or went elsewhere."""
        return (
            None if self.hidden is None else self.hidden.finish(),
            None if self.weight is None else self.weight.finish(),
        )
