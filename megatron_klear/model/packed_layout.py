"""Which packed query attends to which packed key: computed once per microbatch, used by every layer.

A pack lays sequences end to end (THD). Under context parallelism each sequence is cut into 2*cp chunks of
equal length and rank r holds chunks r and 2*cp-1-r of every sequence, so that causal attention costs the
same everywhere. A *segment* is a run of queries that are neighbours both in memory and in their sequence:
the whole sequence when cp is 1, one of the two chunks otherwise. A segment attends to the prefix of its
sequence that ends where the segment ends, causally (aligned at the end of the prefix).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_klear.records import IntArray, PackedBatch, ParallelAxis

_BUCKET_FILL = 0.75
"""A bucket takes segments down to this share of its longest query, so at most a quarter of it is padding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentBucket:
    """Segments of similar length as one padded batch for scaled dot product attention.

    Attributes:
        query_index: int64 [B, Lq], rows of the local pack; padding repeats row 0 of the pack.
        key_index: int64 [B, Lk], rows of the keys gathered over context parallel.
        mask: bool [B, 1, Lq, Lk], True where a query may look; None when plain causal (Lq == Lk) is exact.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """All segments of a pack, in the two forms that the attention backends take.

    Attributes:
        buckets: padded batches for SDPA; together they hold every query once.
        scatter: int64 [T], where each local query's output lies among the flattened buckets.
        query_offsets, key_offsets: int32 [segments + 1], for variable-length flash attention.
        key_index: int64 [sum of prefix lengths], rows of the gathered keys in segment order; None when
            it would be the identity (cp is 1).
        max_query, max_key: longest segment and longest prefix, in tokens.
    """

    buckets: tuple[SegmentBucket, ...]
    scatter: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_index: torch.Tensor | None
    max_query: int
    max_key: int


@dataclass
class PackedLayout(PackedSeqParams):
    """Megatron's packed-sequence parameters, with the plan and positions for our own attention.

    `qkv_format` is "thd" for Transformer Engine, which reads the offsets, and "sbhd" for the local layer
    spec: there the pack is one long row, positions come from `position_ids` and the plan separates the
    sequences.
    """

    plan: AttentionPlan | None = None
    position_ids: torch.Tensor | None = field(default=None)


def packed_layout(batch: PackedBatch, cp: ParallelAxis, *, transformer_engine: bool) -> PackedLayout:
    """Describe a microbatch to the model's attention layers.

    Args:
        batch: the microbatch as this context-parallel rank holds it.
        cp: this rank's place on the context-parallel axis.
        transformer_engine: whether the layers are Transformer Engine's.
    """
    offsets = batch.cu_seqlens_padded
    plan = (
        None if transformer_engine else plan_attention(offsets.cpu().numpy(), cp.rank, cp.size, batch.token_ids.device)
    )
    return PackedLayout(
        qkv_format="thd" if transformer_engine else "sbhd",
        # Padding stands at the end of its sequence, where causal attention shows it to no real token. Counted as tokens
        # it lets Transformer Engine choose any of its kernels: flash-attn has none for gaps between sequences. Under
        # context parallelism its kernels want the padded offsets, divisible by 2 * cp, in any case.
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=offsets,
        cu_seqlens_kv_padded=offsets,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        plan=plan,
        position_ids=batch.position_ids,
    )


def plan_attention(offsets: np.ndarray, cp_rank: int, cp_size: int, device: torch.device) -> AttentionPlan:
    """Plan the attention of one pack.

    Args:
        offsets: int [N + 1], padded offsets of the sequences over the whole context-parallel group.
        cp_rank, cp_size: which zig-zag share of every sequence this rank holds.
        device: where the index tensors go.
    """
    segments = _segments(offsets.astype(np.int64), cp_rank, cp_size)
    queries = [query for query, _ in segments]
    keys = [key for _, key in segments]
    buckets, order = [], []
    by_length = sorted(range(len(segments)), key=lambda i: (-len(queries[i]), -len(keys[i])))
    while by_length:
        longest_query, longest_key = len(queries[by_length[0]]), max(len(keys[i]) for i in by_length)
        members = [i for i in by_length if len(queries[i]) >= _BUCKET_FILL * longest_query]
        if cp_size > 1:  # prefixes differ even among equal chunks: keep those of one bucket alike too
            longest_key = len(keys[members[0]])
            members = [i for i in members if _BUCKET_FILL * longest_key <= len(keys[i]) <= longest_key]
        chosen = set(members)
        by_length = [i for i in by_length if i not in chosen]
        bucket, flat_rows = _bucket([queries[i] for i in members], [keys[i] for i in members], cp_size, device)
        buckets.append(bucket)
        order.append(flat_rows)
    flat = np.concatenate(order)
    scatter = np.empty(int((flat >= 0).sum()), dtype=np.int64)
    scatter[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    lengths_q, lengths_k = [len(q) for q in queries], [len(k) for k in keys]
    return AttentionPlan(
        buckets=tuple(buckets),
        scatter=torch.from_numpy(scatter).to(device),
        query_offsets=_offsets(lengths_q, device),
        key_offsets=_offsets(lengths_k, device),
        key_index=torch.from_numpy(np.concatenate(keys)).to(device) if cp_size > 1 else None,
        max_query=max(lengths_q),
        max_key=max(lengths_k),
    )


def _segments(offsets: IntArray, cp_rank: int, cp_size: int) -> list[tuple[IntArray, IntArray]]:
    """Rows of the local queries and of the gathered keys of every segment, in local order."""
    segments = []
    local_total = int(offsets[-1]) // cp_size
    for start, end in pairwise(offsets):
        length = int(end - start)
        if length == 0:
            continue
        local_start = int(start) // cp_size
        if cp_size == 1:
            rows = np.arange(local_start, local_start + length)
            segments.append((rows, rows))
            continue
        chunk = length // (2 * cp_size)
        position = np.arange(length)
        chunk_id = position // chunk
        second = chunk_id >= cp_size
        holder = np.where(second, 2 * cp_size - 1 - chunk_id, chunk_id)
        rows = holder * local_total + local_start + position % chunk + np.where(second, chunk, 0)
        for half, chunk_held in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            query = local_start + half * chunk + np.arange(chunk)
            segments.append((query, rows[: (chunk_held + 1) * chunk]))
    return segments


def _bucket(
    queries: list[IntArray], keys: list[IntArray], cp_size: int, device: torch.device
) -> tuple[SegmentBucket, IntArray]:
    """Pad segments into one batch; also returns the flattened query rows with -1 at padding."""
    longest_query, longest_key = max(map(len, queries)), max(map(len, keys))
    query_index = np.full((len(queries), longest_query), -1, dtype=np.int64)
    key_index = np.zeros((len(keys), longest_key), dtype=np.int64)
    for row, (query, key) in enumerate(zip(queries, keys, strict=True)):
        query_index[row, : len(query)] = query
        key_index[row, : len(key)] = key
    mask = None
    if cp_size > 1:
        query_lengths = np.array([len(q) for q in queries])[:, None]
        key_lengths = np.array([len(k) for k in keys])[:, None]
        last_visible = key_lengths - query_lengths + np.arange(longest_query)[None, :]
        mask_array = np.arange(longest_key)[None, None, :] <= last_visible[:, :, None]
        mask = torch.from_numpy(mask_array[:, None]).to(device)
    bucket = SegmentBucket(
        query_index=torch.from_numpy(np.maximum(query_index, 0)).to(device),
        key_index=torch.from_numpy(key_index).to(device),
        mask=mask,
    )
    return bucket, query_index.reshape(-1)


def _offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
