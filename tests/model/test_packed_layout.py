"""Who attends to whom: the plan against the definition, position by position, for both backends' forms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_klear.model.packed_layout import AttentionPlan, packed_layout, plan_attention
from megatron_klear.packing import pack, zigzag_indices
from megatron_klear.records import ParallelAxis, TrainSequence

CPU = torch.device("cpu")
PADDED = {1: [(1,), (5, 1, 40, 3, 39, 38, 2), (16,) * 5], 2: [(4,), (4, 64, 8, 12)], 4: [(8,), (16, 64, 8, 24, 56)]}
CASES = [(cp, lengths) for cp, cases in PADDED.items() for lengths in cases]


def owners(offsets: np.ndarray, cp_size: int) -> list[tuple[int, int]]:
    """(sequence, position) of every row of the keys gathered in rank order, from the definition of the split."""
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    rows = np.concatenate([zigzag_indices(offsets, rank, cp_size) for rank in range(cp_size)])
    return list(zip(sequence[rows].tolist(), position[rows].tolist(), strict=True))


def attended_by_buckets(plan: AttentionPlan, total: int) -> list[list[int]]:
    """Key rows that each local query sees, in the order of the local pack."""
    flat: list[list[int]] = []
    queries: list[int] = []
    for bucket in plan.buckets:
        batch, length = bucket.query_index.shape
        for b in range(batch):
            for q in range(length):
                if bucket.mask is None:
                    visible = bucket.key_index[b, : q + 1]
                else:
                    visible = bucket.key_index[b][bucket.mask[b, 0, q]]
                flat.append(visible.tolist())
                queries.append(int(bucket.query_index[b, q]))
    assert [queries[i] for i in plan.scatter.tolist()] == list(range(total)), "every query once, at its own place"
    return [flat[i] for i in plan.scatter.tolist()]


def attended_by_segments(plan: AttentionPlan, total: int) -> list[list[int]]:
    """The same from the variable-length form, causal masks aligned at the end of the keys."""
    key_index = torch.arange(total) if plan.key_index is None else plan.key_index
    queries, keys = plan.query_offsets.tolist(), plan.key_offsets.tolist()
    attended: list[list[int]] = []
    for i in range(len(queries) - 1):
        num_queries, num_keys = queries[i + 1] - queries[i], keys[i + 1] - keys[i]
        segment = key_index[keys[i] : keys[i + 1]].tolist()
        attended += [segment[: num_keys - num_queries + q + 1] for q in range(num_queries)]
    assert plan.max_query == max(np.diff(queries))
    assert plan.max_key == max(np.diff(keys))
    return attended


@pytest.mark.parametrize(("cp_size", "lengths"), CASES)
def test_each_token_attends_to_its_sequence_up_to_itself(cp_size: int, lengths: tuple[int, ...]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    whose = owners(offsets, cp_size)
    total = int(offsets[-1]) // cp_size
    for rank in range(cp_size):
        plan = plan_attention(offsets, rank, cp_size, CPU)
        for attended in (attended_by_buckets(plan, total), attended_by_segments(plan, total)):
            for query, rows in enumerate(attended):
                sequence, position = whose[rank * total + query]
                assert sorted(whose[row] for row in rows) == [(sequence, p) for p in range(position + 1)]


@pytest.mark.parametrize(("cp_size", "lengths"), CASES)
def test_ranks_do_equal_work(cp_size: int, lengths: tuple[int, ...]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1]) // cp_size
    plans = [plan_attention(offsets, rank, cp_size, CPU) for rank in range(cp_size)]
    work = [sum(map(len, attended_by_segments(plan, total))) for plan in plans]
    assert len(set(work)) == 1, "the zig-zag split gives every rank the same number of query-key pairs"


def test_buckets_hold_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.pareto(1.2, 60) * 40 + 1, 2000).astype(int)
    plan = plan_attention(np.concatenate([[0], np.cumsum(lengths)]), 0, 1, CPU)
    slots = sum(bucket.query_index.numel() for bucket in plan.buckets)
    assert slots <= lengths.sum() / 0.75
    assert len(plan.buckets) < 30


def test_a_sequence_without_tokens_takes_no_part() -> None:
    with_empty = plan_attention(np.array([0, 3, 3, 5]), 0, 1, CPU)
    assert attended_by_buckets(with_empty, 5) == [[0], [0, 1], [0, 1, 2], [3], [3, 4]]


def sequence(length: int) -> TrainSequence:
    zeros = np.zeros(length, dtype=np.float32)
    return TrainSequence(
        sequence_id=f"of {length}",
        token_ids=np.arange(length),
        policy_weight=zeros,
        lm_weight=zeros,
        advantages=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
    )


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_layout_carries_what_each_kind_of_layer_reads(transformer_engine: bool) -> None:
    batch = pack([sequence(5), sequence(9)], cp_rank=1, cp_size=2)
    axis = ParallelAxis(rank=1, size=2, group=SimpleNamespace())  # type: ignore[arg-type]
    layout = packed_layout(batch, axis, transformer_engine=transformer_engine)
    assert layout.qkv_format == ("thd" if transformer_engine else "sbhd")
    assert (layout.plan is None) == transformer_engine
    for offsets in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        assert getattr(layout, offsets).tolist() == [0, 8, 20], offsets  # padding is at the end: no token sees it
    assert layout.max_seqlen_q == layout.max_seqlen_kv == 12
    # Rank 1 of 2 holds the middle two quarters of every sequence.
    assert layout.position_ids is not None
    assert layout.position_ids.tolist() == [2, 3, 4, 5, 3, 4, 5, 6, 7, 8]
