"""The zig-zag layout against a loop written from its definition, and against Megatron-Core's own RoPE for packs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_klear.packing import pack_multiple, sequence_multiple, zigzag_indices
from megatron_klear.packing.layout import round_up


def zigzag_by_loop(offsets: list[int], cp_rank: int, cp_size: int) -> list[int]:
    held = []
    for start, end in pairwise(offsets):
        chunk = (end - start) // (2 * cp_size)
        chunks = [list(range(start + n * chunk, start + (n + 1) * chunk)) for n in range(2 * cp_size)]
        held += chunks[cp_rank] + chunks[2 * cp_size - 1 - cp_rank]
    return held


class GroupOf:
    """Stands in for a process group: Megatron's RoPE asks it for nothing but rank and size."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_zigzag_is_the_definition_and_covers_every_token_once(cp_size: int) -> None:
    offsets = np.cumsum([0, 2 * cp_size, 10 * cp_size, 0, 4 * cp_size])
    shares = [zigzag_indices(offsets, rank, cp_size) for rank in range(cp_size)]
    for rank, share in enumerate(shares):
        assert share.tolist() == zigzag_by_loop(offsets.tolist(), rank, cp_size)
    assert sorted(np.concatenate(shares).tolist()) == list(range(int(offsets[-1])))


def test_without_a_split_a_rank_holds_everything_in_order() -> None:
    assert zigzag_indices(np.array([0, 3, 7]), 0, 1).tolist() == list(range(7))


def test_all_ranks_have_equal_causal_attention_work() -> None:
    offsets = np.array([0, 64])
    work = [int((zigzag_indices(offsets, rank, 4) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_megatrons_packed_rope_gives_every_held_token_the_angle_of_its_position(cp_size: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    lengths = [8 * cp_size, 2 * cp_size, 6 * cp_size]
    offsets = np.cumsum([0, *lengths])
    longest = max(lengths)
    # Rotating (1, 0) by an angle of its position gives (cos, sin): the angle that Megatron used can be read off.
    angles = torch.arange(longest, dtype=torch.float64) * 0.01
    freqs = angles[:, None, None, None].expand(longest, 1, 1, 2)
    positions = np.concatenate([np.arange(n) for n in lengths])
    for rank in range(cp_size):
        held = zigzag_indices(offsets, rank, cp_size)
        unit = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(held), 1, 2)
        rotated = _apply_rotary_pos_emb_thd(
            unit, torch.from_numpy(offsets.astype(np.int32)), freqs, cp_group=GroupOf(rank, cp_size)
        )
        used = torch.atan2(rotated[:, 0, 1], rotated[:, 0, 0]) / 0.01
        assert used.round().to(torch.int64).tolist() == positions[held].tolist()


def test_multiples() -> None:
    assert [sequence_multiple(cp) for cp in (1, 2, 4)] == [1, 4, 8]
    assert pack_multiple(1, 1) == 1
    assert pack_multiple(1, 8) == 8
    assert pack_multiple(2, 1) == 4
    assert pack_multiple(2, 8) == 16
    assert pack_multiple(3, 4) == 12
    assert round_up(np.array([0, 1, 4, 5]), 4).tolist() == [0, 4, 4, 8]


def test_lengths_that_do_not_divide_and_ranks_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        zigzag_indices(np.array([0, 6]), 0, 2)
    with pytest.raises(ValueError, match="cp_rank is 2"):
        zigzag_indices(np.array([0, 8]), 2, 2)


@pytest.mark.parametrize(("cp", "tp", "multiple"), [(1, 1, 16), (2, 1, 16), (2, 4, 16), (3, 2, 128), (4, 1, 1)])
def test_every_ranks_share_is_a_multiple_of_what_fp8_needs_and_no_smaller_pack_would_do(
    cp: int, tp: int, multiple: int
) -> None:
    whole = pack_multiple(cp, tp, multiple)
    fits = [n for n in range(1, whole + 1) if n % (cp * tp * multiple) == 0 and n % sequence_multiple(cp) == 0]
    assert fits == [whole]
