"""Packs against a dictionary of expected entries built token by token, in every layout."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_klear.packing import pack, unpack
from megatron_klear.records import IGNORED_LABEL, PackedBatch, TrainSequence

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 3)]
FIELDS = ("policy_weight", "lm_weight", "advantages", "old_logprobs", "rollout_logprobs")


def sequence(name: str, length: int, seed: int = 0) -> TrainSequence:
    """A sequence in which every number is different, so that nothing can be mixed up unseen."""
    rng = np.random.default_rng([seed, length])
    arrays = {field: rng.random(length).astype(np.float32) + 1 for field in FIELDS}
    arrays["policy_weight"][0] = arrays["lm_weight"][0] = 0
    return TrainSequence(sequence_id=name, token_ids=rng.permutation(100_000)[:length].astype(np.int64) + 1, **arrays)


def all_ranks(sequences: list[TrainSequence], cp_size: int, tp_size: int, **keywords: int) -> list[PackedBatch]:
    return [pack(sequences, cp_rank=r, cp_size=cp_size, tp_size=tp_size, **keywords) for r in range(cp_size)]


@pytest.mark.parametrize(("cp_size", "tp_size"), LAYOUTS)
def test_every_prediction_is_held_once_with_its_own_numbers(cp_size: int, tp_size: int) -> None:
    sequences = [sequence("a", 13), sequence("b", 1), sequence("c", 30), sequence("d", 8)]
    expected = Counter()
    for s in sequences:
        for i in range(1, len(s.token_ids)):
            numbers = tuple(float(getattr(s, field)[i]) for field in FIELDS)
            expected[(int(s.token_ids[i - 1]), int(s.token_ids[i]), i - 1, *numbers)] += 1
    found = Counter()
    for batch in all_ranks(sequences, cp_size, tp_size):
        for t in range(batch.token_ids.numel()):
            if batch.labels[t] != IGNORED_LABEL:
                numbers = tuple(float(getattr(batch, field)[t]) for field in FIELDS)
                key = (int(batch.token_ids[t]), int(batch.labels[t]), int(batch.position_ids[t]), *numbers)
                found[key] += 1
            else:
                assert all(float(getattr(batch, field)[t]) == 0 for field in FIELDS)
    assert found == expected


@pytest.mark.parametrize(("cp_size", "tp_size"), LAYOUTS)
def test_offsets_cover_the_whole_group_and_divide_as_the_layout_wants(cp_size: int, tp_size: int) -> None:
    sequences = [sequence("a", 13), sequence("b", 1), sequence("c", 30)]
    for batch in all_ranks(sequences, cp_size, tp_size):
        local = batch.token_ids.numel()
        assert local % tp_size == 0
        padded = batch.cu_seqlens_padded
        assert padded.dtype == batch.cu_seqlens.dtype == torch.int32
        assert int(padded[-1]) == local * cp_size
        assert batch.cu_seqlens.tolist() == [0, 13, 14, 44]
        lengths = padded.diff()
        if cp_size > 1:
            assert (lengths % (2 * cp_size) == 0).all()
        assert (lengths >= batch.cu_seqlens.diff()).all()
        # No sequence but the last is padded further than it needs to be.
        assert (lengths[:-1] - batch.cu_seqlens.diff()[:-1] < max(1, 2 * cp_size)).all()
        assert batch.max_seqlen == int(lengths.max())
        assert batch.sequence_ids == ("a", "b", "c")


def test_positions_are_those_that_the_zigzag_split_puts_there() -> None:
    first, second = all_ranks([sequence("a", 7), sequence("b", 4)], cp_size=2, tp_size=1)
    # Padded to 8 and 4: chunks of 2 and of 1; rank 0 holds chunks 0 and 3 of each, rank 1 chunks 1 and 2.
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert second.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert first.cu_seqlens_padded.tolist() == second.cu_seqlens_padded.tolist() == [0, 8, 12]


def test_labels_at_the_end_of_a_sequence_never_look_into_the_next() -> None:
    a, b = sequence("a", 3), sequence("b", 2, seed=1)
    batch = pack([a, b])
    assert batch.labels.tolist() == [*a.token_ids[1:].tolist(), IGNORED_LABEL, int(b.token_ids[1]), IGNORED_LABEL]


@pytest.mark.parametrize(("cp_size", "tp_size"), LAYOUTS)
def test_an_empty_pack_is_one_ignored_filler(cp_size: int, tp_size: int) -> None:
    for batch in all_ranks([], cp_size, tp_size, pad_token_id=7):
        assert batch.token_ids.numel() > 0
        assert batch.token_ids.numel() % tp_size == 0
        assert (batch.token_ids == 7).all()
        assert (batch.labels == IGNORED_LABEL).all()
        assert batch.sequence_ids == ()
        assert batch.cu_seqlens_padded.tolist() == [0, batch.token_ids.numel() * cp_size]
        assert unpack([torch.ones(batch.token_ids.numel())] * cp_size, batch) == []


@pytest.mark.parametrize(("cp_size", "tp_size"), LAYOUTS)
@pytest.mark.parametrize("names", ["", "ab"])
def test_pad_to_fixes_the_shape_with_short_fillers(cp_size: int, tp_size: int, names: str) -> None:
    pad_to = 2 * 12 * 4 * 33
    sequences = [sequence(name, 50) for name in names]
    for batch in all_ranks(sequences, cp_size, tp_size, pad_to=pad_to):
        assert batch.token_ids.numel() == pad_to // cp_size
        assert int(batch.cu_seqlens_padded[-1]) == pad_to
        assert len(batch.cu_seqlens) == len(batch.cu_seqlens_padded)
        assert int(batch.cu_seqlens_padded.diff().min()) > 0
        assert batch.max_seqlen <= 1100
        assert int((batch.labels != IGNORED_LABEL).sum()) <= 49 * len(names)
    held = sum(int((b.labels != IGNORED_LABEL).sum()) for b in all_ranks(sequences, cp_size, tp_size, pad_to=pad_to))
    assert held == 49 * len(names)


def test_pad_to_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 and at least 12"):
        pack([sequence("a", 10)], cp_size=2, pad_to=8)
    with pytest.raises(ValueError, match="multiple of 4 and at least 12"):
        pack([sequence("a", 10)], cp_size=2, pad_to=14)


@pytest.mark.parametrize(("cp_size", "tp_size"), LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
def test_unpack_gives_each_token_the_value_of_the_position_that_predicts_it(
    cp_size: int, tp_size: int, padded: bool
) -> None:
    sequences = [sequence("a", 13), sequence("b", 1), sequence("c", 30), sequence("d", 8)]
    keywords = {"pad_to": 2400} if padded else {}
    batches = all_ranks(sequences, cp_size, tp_size, **keywords)
    # The value of a position is a code of the token that it holds and its place: a wrong place cannot go unseen.
    shards = [(b.token_ids * 37 + b.position_ids).to(torch.float32) for b in batches]
    for batch in batches:
        arrays = unpack(shards, batch, [13, 1, 30, 8])
        for s, values in zip(sequences, arrays, strict=True):
            expected = [0.0] + [
                float(np.float32(int(s.token_ids[i - 1]) * 37 + i - 1)) for i in range(1, len(s.token_ids))
            ]
            assert values.dtype == np.float32
            assert values.tolist() == expected


def test_old_logprobs_survive_the_round_trip() -> None:
    sequences = [sequence("a", 21), sequence("b", 9)]
    for cp_size, tp_size in itertools.product((1, 2, 4), (1, 2)):
        batches = all_ranks(sequences, cp_size, tp_size)
        arrays = unpack([b.old_logprobs for b in batches], batches[0])
        for s, values in zip(sequences, arrays, strict=True):
            assert values[1:].tolist() == s.old_logprobs[1:].tolist()


def test_unpack_refuses_what_is_not_of_this_pack() -> None:
    batch = pack([sequence("a", 5)])
    with pytest.raises(ValueError, match=r"of \[5\] tokens, not of \[6\]"):
        unpack([torch.zeros(5)], batch, [6])
    with pytest.raises(ValueError, match="cp rank 0"):
        unpack([torch.zeros(4)], batch)


def test_a_weight_on_the_first_token_is_refused_since_nothing_predicts_it() -> None:
    s = sequence("first", 4)
    s.lm_weight[0] = 1
    with pytest.raises(ValueError, match="sequence first: entry 0"):
        pack([s])


def test_arrays_of_different_lengths_are_refused() -> None:
    good = sequence("short", 4)
    arrays = {field: getattr(good, field) for field in FIELDS} | {"advantages": np.zeros(3, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"sequence short: advantages has shape \(3,\)"):
        pack([TrainSequence(sequence_id="short", token_ids=good.token_ids, **arrays)])


def test_a_sequence_without_tokens_is_refused() -> None:
    empty = np.zeros(0, dtype=np.float32)
    with pytest.raises(ValueError, match="sequence none has no tokens"):
        pack([TrainSequence(sequence_id="none", token_ids=np.zeros(0, np.int64), **dict.fromkeys(FIELDS, empty))])
