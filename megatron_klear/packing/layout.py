"""Where the tokens of a pack lie: padding multiples and the zig-zag split over context parallelism.

Under causal attention the last tokens of a sequence cost the most. So every sequence is cut into 2 * cp chunks and
rank r takes chunk r from the front and chunk 2 * cp - 1 - r, its mirror image, from the back: all ranks then do
equal work. This is the layout of Megatron-Core 0.16.1's rotary embedding for packed sequences and of Transformer
Engine's context-parallel attention; both want each sequence's padded length to be a multiple of 2 * cp.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megatron_klear.records import IntArray


def sequence_multiple(cp_size: int) -> int:
    """Number of tokens that each sequence's padded length must be a multiple of: 2 * cp, or 1 without a split."""
    return 1 if cp_size == 1 else 2 * cp_size


def pack_multiple(cp_size: int, tp_size: int, token_multiple: int = 1) -> int:
    """Number of tokens that a whole pack must be a multiple of, over its context-parallel group.

    Args:
        cp_size: context parallel size.
        tp_size: tensor parallel size under sequence parallelism, which splits each rank's tokens; else 1.
        token_multiple: what the tokens of a rank must be a multiple of after that split (setting fp8.recipe).
    """
    return math.lcm(sequence_multiple(cp_size), cp_size * tp_size * token_multiple)


def round_up(tokens: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Round token counts up to a multiple."""
    return -(-tokens // multiple) * multiple


def zigzag_indices(cu_seqlens_padded: NDArray[np.integer], cp_rank: int, cp_size: int) -> IntArray:
    """Positions of the whole pack that one context-parallel rank holds, in the order in which it holds them.

    Args:
        cu_seqlens_padded: int [N + 1], offsets whose differences are multiples of 2 * cp (of 1 when cp is 1).
        cp_rank, cp_size: place in the context-parallel group.

    Returns:
        int64 [T], T being the whole pack's tokens over cp.

    Raises:
        ValueError: the rank is outside the group, or a padded length does not divide.
    """
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank is {cp_rank}, must be from 0 to {cp_size - 1}")
    offsets = np.asarray(cu_seqlens_padded, dtype=np.int64)
    lengths = np.diff(offsets)
    if cp_size == 1:
        return np.arange(offsets[-1], dtype=np.int64)
    if np.any(lengths % (2 * cp_size)):
        raise ValueError(f"padded lengths {lengths.tolist()} must be multiples of 2 * cp = {2 * cp_size}")
    chunk = lengths // (2 * cp_size)
    starts = np.stack([offsets[:-1] + cp_rank * chunk, offsets[:-1] + (2 * cp_size - 1 - cp_rank) * chunk], axis=1)
    # Runs (start, count) laid end to end: position = start of the run + index within the run.
    counts = np.repeat(chunk, 2)
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    held: IntArray = np.arange(counts.sum(), dtype=np.int64) + np.repeat(starts.reshape(-1) - before, counts)
    return held
