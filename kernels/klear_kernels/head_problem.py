"""The arguments both operations share: checked once, then handed to a backend as one record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from klear_kernels.backends import choose_backend
from klear_kernels.chunking import chunk_slices
from klear_kernels.vocab_shard import VocabShard

INPUT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""Not float16: gradients are formed before any loss scale is known, and would underflow in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """What a call asks for, besides its tensors.

    Attributes:
        shard: the vocabulary shard and its process group.
        temperature: logits are divided by it.
        with_entropy: whether the entropy of each row is wanted.
        chunk_tokens: most rows of logits to hold, or None to choose from a byte budget.
        ignore_index: label of positions that predict nothing.
        backend: name of the backend.
    """

    shard: VocabShard
    temperature: float
    with_entropy: bool
    chunk_tokens: int | None
    ignore_index: int
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProblem:
    """One head to compute: K of T tokens against the valid words of this rank's shard.

    Attributes:
        hidden: [T, H] in the input dtype, gathered over tensor-parallel ranks when sequence-parallel.
        weight: [valid_rows, H] in the input dtype, a view without the padding.
        labels: int64 [T], global word ids.
        rows: int64 [K], which tokens to compute, ascending.
        options: see HeadOptions.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    options: HeadOptions

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32: logits, row statistics, gradient sums."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    def chunks(self, *, word_bytes: float | None = None, budget_bytes: int | None = None) -> list[slice]:
        """Slices of `rows`, equal on all tensor-parallel ranks.

        Args:
            word_bytes: bytes held per row and word of the shard; default one logit in the compute dtype.
            budget_bytes: most bytes of a chunk; default by the device.
        """
        return chunk_slices(
            self.num_rows,
            vocab_rows=self.options.shard.rows,
            word_bytes=self.compute_dtype.itemsize if word_bytes is None else word_bytes,
            device=self.hidden.device,
            chunk_tokens=self.options.chunk_tokens,
            budget_bytes=budget_bytes,
        )

    def hidden_rows(self, chunk: slice) -> torch.Tensor:
        """[C, H] hidden states of a chunk, a view where no row is left out."""
        if self.num_rows == self.hidden.shape[0]:
            return self.hidden[chunk]
        return self.hidden.index_select(0, self.rows[chunk])

    def label_rows(self, chunk: slice) -> torch.Tensor:
        """int64 [C] labels of a chunk."""
        return self.labels.index_select(0, self.rows[chunk])

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """[K] values -> [T], exact zeros at tokens that were not computed."""
        if self.num_rows == self.labels.shape[0]:
            return values
        return values.new_zeros(self.labels.shape[0]).index_copy_(0, self.rows, values)


def head_problem(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    options: HeadOptions,
    rows: torch.Tensor | None = None,
) -> HeadProblem:
    """Gather what is split by tokens, drop what is padding, and find the rows to compute.

    Args:
        hidden: [T, H], or [T / tp, H] when sequence-parallel.
        weight: [V_local, H].
        labels: int64 [T].
        options: see HeadOptions.
        rows: int64 [K] tokens to compute; None for all whose label is not ignored.
    """
    if rows is None:
        rows = labels.ne(options.ignore_index).nonzero().squeeze(1)
    return HeadProblem(
        hidden=options.shard.gather_tokens(hidden),
        weight=weight[: options.shard.valid_rows],
        labels=labels,
        rows=rows,
        options=options,
    )


def check_head_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    temperature: float,
    sequence_parallel: bool,
    with_entropy: bool,
    chunk_tokens: int | None,
    ignore_index: int,
    softcap: float | None,
    operation: str,
    backend: str | None,
) -> HeadOptions:
    """Refuse, by name, arguments that cannot work, before any product; return the options.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes, devices, labels or numbers that do not fit together, or a backend that cannot run.
    """
    _check_tensors(hidden, weight, labels)
    if softcap is not None:
        raise ValueError(f"softcap: got {softcap}, allowed None: capped logits are not computed here")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, allowed a finite number above 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}, allowed 1 or more, or None to choose")
    shard = VocabShard.of(weight.shape[0], vocab_size=vocab_size, group=tp_group, sequence_parallel=sequence_parallel)
    tokens = hidden.shape[0] * (shard.size if sequence_parallel else 1)
    if labels.shape[0] != tokens:
        split = f" (hidden holds {hidden.shape[0]} on each of {shard.size} ranks)" if sequence_parallel else ""
        raise ValueError(f"labels: got {labels.shape[0]} tokens, hidden has {tokens}{split}")
    words = weight.shape[0] * shard.size if vocab_size is None else vocab_size
    outside = labels.ne(ignore_index) & (labels.lt(0) | labels.ge(words))
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise ValueError(
            f"labels: got {int(labels[where])} at position {where}, allowed 0 to {words - 1} "
            f"or ignore_index ({ignore_index})"
        )
    return HeadOptions(
        shard=shard,
        temperature=float(temperature),
        with_entropy=with_entropy,
        chunk_tokens=chunk_tokens,
        ignore_index=ignore_index,
        backend=choose_backend(operation, backend, hidden.device, hidden.dtype),
    )


def described(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: HeadOptions, **others: Any
) -> dict[str, Any]:
    """What all ranks of a tensor-parallel group must be given alike, by argument name.

    Tensors that must be equal are told by a checksum, which reads a number back from the device.
    """
    recording = torch.is_grad_enabled()
    places = torch.arange(1, labels.shape[0] + 1, device=labels.device)
    return {
        "labels": f"{labels.shape[0]} tokens with checksum {int((labels * places).sum())}",
        "hidden": f"{hidden.dtype} {tuple(hidden.shape)}, requires_grad {recording and hidden.requires_grad}",
        "weight": f"{weight.dtype} {tuple(weight.shape)}, requires_grad {recording and weight.requires_grad}",
        "temperature": options.temperature,
        "sequence_parallel": options.shard.sequence_parallel,
        "with_entropy": options.with_entropy,
        "chunk_tokens": options.chunk_tokens,
        "ignore_index": options.ignore_index,
        "backend": options.backend,
        **others,
    }


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    for name, tensor, ndim in (("hidden", hidden, 2), ("weight", weight, 2), ("labels", labels, 1)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, allowed a tensor")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, allowed {ndim} dimension(s)")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, hidden is on {hidden.device}")
    if hidden.dtype not in INPUT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
        raise TypeError(f"hidden: got {hidden.dtype}, allowed {allowed}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got {weight.dtype}, hidden is {hidden.dtype}; cast one of them")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, allowed int64")
    if weight.shape[0] == 0:
        raise ValueError("weight: got no rows, allowed 1 or more words per shard")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: got hidden size {weight.shape[1]}, hidden has {hidden.shape[1]}")
