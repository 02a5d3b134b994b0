"""How Megatron lays gradients out in one buffer, and which part of it each data-parallel rank updates.

With the distributed optimizer weights lie in a buffer of the same layout, parameters begin at multiples of 64 numbers
and buckets end at common multiples of 128 and the number of ranks that share the update. Without it nothing is padded.
Source: megatron/core/distributed/param_and_grad_buffer.py and optimizer/distrib_optimizer.py of Megatron-Core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klear.planning.parameters import Parameter

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientBuffer:
    """A buffer's layout, in numbers.

    Attributes:
        ranges: where each parameter lies, (start, end), last registered first.
        buckets: where each bucket lies, (start, end), padding included; they fill the buffer.
        shards: data and context parallel ranks that share it.
    """

    ranges: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]
    shards: int

    @property
    def numel(self) -> int:
        """Numbers in the buffer, padding included."""
        return self.buckets[-1][1]

    @property
    def largest_bucket(self) -> int:
        """Numbers of the largest bucket."""
        return max(end - start for start, end in self.buckets)

    def owned(self) -> list[int]:
        """Numbers that each of the ranks updates, padding left out."""
        found = [0] * self.shards
        ranges = iter(sorted(self.ranges))
        low, high = next(ranges)
        for start, end in self.buckets:
            share = (end - start) // self.shards
            while low < end:  # every parameter lies in one bucket
                for rank in range((low - start) // share, min(self.shards, -(-(high - start) // share))):
                    found[rank] += min(high, start + (rank + 1) * share) - max(low, start + rank * share)
                low, high = next(ranges, (self.numel, self.numel))
        return found


def gradient_buffer(
    parameters: Sequence[Parameter], *, shards: int, distributed: bool, bucket_size: int | None
) -> GradientBuffer:
    """Lay out the gradients of a rank.

    Args:
        parameters: in the order of their registration; the buffer takes them backwards, as gradients become ready.
        shards: data parallel times context parallel ranks.
        distributed: whether the distributed optimizer is used.
        bucket_size: numbers after which a bucket is closed, None for a single bucket.
    """
    bucket_multiple = math.lcm(shards, _BUCKET_ALIGNMENT) if distributed else 1
    alignment = _PARAMETER_ALIGNMENT if distributed else 1
    ranges: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start, open_bucket, end = 0, False, 0

    def close(at: int) -> int:
        nonlocal bucket_start, open_bucket
        closed = _round_up(at, bucket_multiple)
        buckets.append((bucket_start, closed))
        bucket_start, open_bucket = closed, False
        return closed

    next_start = 0
    for parameter in reversed(parameters):
        start = _round_up(next_start, alignment)
        alone = parameter.tied_across_stages and distributed
        if alone and open_bucket:
            start = close(start)
        end = start + parameter.numel
        ranges.append((start, end))
        open_bucket = True
        full = bucket_size is not None and end - bucket_start >= bucket_size
        next_start = close(end) if full or alone else end
    if open_bucket:
        close(end)
    return GradientBuffer(ranges=tuple(ranges), buckets=tuple(buckets), shards=shards)


def bucket_size_of(*, overlap_grad_reduce: bool, dp: int, stage: int) -> int | None:
    """Numbers per bucket as Megatron chooses them: only the first stage is cut, and only to overlap its reduction."""
    return max(40_000_000, 1_000_000 * dp) if overlap_grad_reduce and stage == 0 else None


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
