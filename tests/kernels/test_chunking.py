"""Chunk sizes: cover every row once, within the budget, equal on all ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_kernels.chunking import CHUNK_BYTES, DEFAULT_CHUNK_BYTES, MAX_CHUNK_ELEMENTS, chunk_slices

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(0, 40_000),
    vocab_rows=st.integers(1, 200_000),
    chunk_tokens=st.none() | st.integers(1, 50_000),
)
def test_slices_cover_every_row_once_within_the_limits(
    num_rows: int, vocab_rows: int, chunk_tokens: int | None
) -> None:
    slices = chunk_slices(num_rows, vocab_rows=vocab_rows, word_bytes=4, device=CPU, chunk_tokens=chunk_tokens)
    position = 0
    for part in slices:
        assert part.start == position
        assert part.stop > part.start
        position = part.stop
    assert position == num_rows
    longest = max((part.stop - part.start for part in slices), default=0)
    assert longest * vocab_rows <= max(MAX_CHUNK_ELEMENTS, vocab_rows)
    if chunk_tokens is not None:
        assert longest <= chunk_tokens
    else:
        assert longest <= 16 or longest * vocab_rows * 4 <= CHUNK_BYTES["cpu"]


def test_full_size_head_keeps_offsets_below_31_bits() -> None:
    slices = chunk_slices(32768, vocab_rows=151936, word_bytes=4, device=torch.device("cuda"), chunk_tokens=32768)
    assert all((part.stop - part.start) * 151936 < 2**31 for part in slices)
    automatic = chunk_slices(32768, vocab_rows=151936, word_bytes=4, device=torch.device("cuda"), chunk_tokens=None)
    assert all((part.stop - part.start) * 151936 * 4 <= DEFAULT_CHUNK_BYTES for part in automatic)


def test_a_budget_of_the_callers_own() -> None:
    """One bfloat16 value per word: four chunks of 8192 rows at the full vocabulary, one for an eighth of it."""
    slices = [
        chunk_slices(
            32768,
            vocab_rows=vocab_rows,
            word_bytes=2,
            device=torch.device("cuda"),
            chunk_tokens=None,
            budget_bytes=2_500_000_000,
        )
        for vocab_rows in (151936, 18992)
    ]
    assert [part.stop - part.start for part in slices[0]] == [8192] * 4
    assert slices[1] == [slice(0, 32768)]


@pytest.mark.parametrize("num_rows", [1765, 1767, 3600])
def test_no_chunk_is_a_small_remainder(num_rows: int) -> None:
    slices = chunk_slices(num_rows, vocab_rows=151936, word_bytes=4, device=torch.device("cuda"), chunk_tokens=None)
    sizes = [part.stop - part.start for part in slices]
    assert min(sizes) > 0.9 * max(sizes)
