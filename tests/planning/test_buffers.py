"""Layouts of gradient buffers worked out by hand, where four processes cannot show a rule."""

from __future__ import annotations

from megatron_klear.planning.buffers import bucket_size_of, gradient_buffer
from megatron_klear.planning.parameters import Parameter


def parameters(*numels: int, tied: tuple[int, ...] = ()) -> list[Parameter]:
    return [Parameter(name=str(i), numel=n, tied_across_stages=i in tied) for i, n in enumerate(numels)]


def test_buckets_end_at_what_128_and_the_ranks_divide() -> None:
    buffer = gradient_buffer(parameters(10), shards=6, distributed=True, bucket_size=None)
    assert buffer.numel == 384  # lcm(6, 128)
    assert buffer.owned() == [10, 0, 0, 0, 0, 0]  # of 64 numbers each


def test_parameters_begin_at_multiples_of_64_from_the_last_registered_on() -> None:
    buffer = gradient_buffer(parameters(70, 30), shards=2, distributed=True, bucket_size=None)
    assert buffer.ranges == ((0, 30), (64, 134))
    assert buffer.buckets == ((0, 256),)
    assert buffer.owned() == [30 + 64, 6]


def test_tied_embeddings_have_a_bucket_of_their_own() -> None:
    """So that first and last stage share them out alike: what came before is closed first."""
    buffer = gradient_buffer(parameters(60, 130, tied=(0,)), shards=2, distributed=True, bucket_size=None)
    assert buffer.ranges == ((0, 130), (256, 316))
    assert buffer.buckets == ((0, 256), (256, 384))
    assert buffer.owned() == [128 + 60, 2]
    last = gradient_buffer(parameters(130, 60, tied=(1,)), shards=2, distributed=True, bucket_size=None)
    assert last.buckets == ((0, 128), (128, 384))
    assert last.owned() == [60 + 128, 2]


def test_a_full_bucket_is_closed() -> None:
    buffer = gradient_buffer(parameters(50, 100, 100), shards=2, distributed=True, bucket_size=150)
    assert buffer.ranges == ((0, 100), (128, 228), (256, 306))
    assert buffer.buckets == ((0, 256), (256, 384))
    assert buffer.largest_bucket == 256


def test_without_the_distributed_optimizer_nothing_is_padded() -> None:
    buffer = gradient_buffer(parameters(7, 5, tied=(0,)), shards=4, distributed=False, bucket_size=None)
    assert (buffer.ranges, buffer.numel) == (((0, 5), (5, 12)), 12)


def test_only_the_first_stage_is_cut_to_overlap() -> None:
    assert bucket_size_of(overlap_grad_reduce=False, dp=8, stage=0) is None
    assert bucket_size_of(overlap_grad_reduce=True, dp=8, stage=0) == 40_000_000
    assert bucket_size_of(overlap_grad_reduce=True, dp=64, stage=0) == 64_000_000
    assert bucket_size_of(overlap_grad_reduce=True, dp=64, stage=1) is None
