"""A stream of named tensors in buckets of bounded size, in the engines' data type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors that travel together.

    Attributes:
        names: Hugging Face names.
        tensors: one per name, contiguous.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def flat(self) -> torch.Tensor:
        """All tensors one after another, as bytes: uint8 [num_bytes]."""
        return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in self.tensors])


def converted(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream in another data type, rounded to nearest even as the engine itself would."""
    for name, tensor in named_tensors:
        yield name, tensor.detach().to(dtype).contiguous()


def bucketed(named_tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Collect tensors until the next one would make a bucket larger than `bucket_bytes`.

    A tensor is never split; one that is larger by itself has a bucket of its own.
    """
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    filled = 0
    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if names and filled + size > bucket_bytes:
            yield Bucket(names=tuple(names), tensors=tuple(tensors))
            names, tensors, filled = [], [], 0
        names.append(name)
        tensors.append(tensor)
        filled += size
    if names:
        yield Bucket(names=tuple(names), tensors=tuple(tensors))
