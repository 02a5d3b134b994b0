"""Row sums of a product of hidden states and weight, tile by tile, with none of it stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from klear_kernels.triton_tiles import (
    LOG2_E,
    aligned,
    launching_on,
    matrix_descriptor,
    tile_position,
    tile_product,
    tile_shape,
)

NO_WORD = -1e30
"""The logit of what is no word or is the label: below every other, and finite, so that nothing becomes NaN."""


@triton.jit(
    do_not_specialize=["num_rows", "num_words", "size", "scale"],
    do_not_specialize_on_alignment=["label_columns", "maxima", "sums", "weighted_sums"],
)
def statistics_kernel(
    hidden,
    weight,
    label_columns,
    maxima,
    sums,
    weighted_sums,
    num_rows,
    num_words,
    size,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NO_WORD: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Write m, sum e and sum e (z - m) of each row of each tile, e = 2^(z - m), m = max z, without the label.

    A tile that holds nothing but a row's label has m = NO_WORD and sums that mean nothing.

    Args:
        hidden, weight: descriptors of [num_rows, size] and [num_words, size].
        label_columns: int32 [num_rows], the label's column, anything else where it is not in this shard.
        maxima, sums, weighted_sums: float32 [word blocks, num_rows], in powers of two.
        scale: what products are multiplied by to become z, the logits over the temperature in powers of two.
    """
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_words, BLOCK_WORDS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_block, word_block = tile_position(tile, num_rows, num_words, BLOCK_ROWS, BLOCK_WORDS, GROUP_ROWS)
        z = tile_product(hidden, weight, row_block, word_block, size, BLOCK_ROWS, BLOCK_WORDS, BLOCK_HIDDEN) * scale
        rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        words = word_block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        in_rows = rows < num_rows
        label = tl.load(label_columns + rows, mask=in_rows, other=-1)
        others = (words < num_words)[None, :] & (words[None, :] != label[:, None])
        z = tl.where(others, z, NO_WORD)
        top = tl.max(z, 1)
        gap = z - top[:, None]
        exponentials = tl.exp2(gap)  # 0 where there is no word, and so is its product with the gap, which is finite
        target = word_block.to(tl.int64) * num_rows + rows
        tl.store(maxima + target, top, mask=in_rows)
        tl.store(sums + target, tl.sum(exponentials, 1), mask=in_rows)
        if WITH_ENTROPY:
            tl.store(weighted_sums + target, tl.sum(exponentials * gap, 1), mask=in_rows)


def tile_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    label_columns: torch.Tensor,
    *,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maxima, sums and weighted sums [word blocks, C] of the rows, the label left out, in powers of two.

    Where a maximum is NO_WORD the tile had nothing but the label, and its sums are to be left out.

    Args:
        hidden: bfloat16 [C, H].
        weight: bfloat16 [valid_rows, H], one row or more.
        label_columns: int32 [C].
        temperature: divides the logits.
        with_entropy: whether weighted sums are wanted; uninitialised where not.
    """
    shape = tile_shape(hidden.device)
    hidden, weight = aligned(hidden), aligned(weight)
    num_rows, num_words = hidden.shape[0], weight.shape[0]
    maxima, sums, weighted_sums = hidden.new_empty(
        3, -(-num_words // shape.words), num_rows, dtype=torch.float32
    ).unbind(0)
    with launching_on(hidden.device):
        statistics_kernel[shape.grid(num_rows, num_words, hidden.device)](
            matrix_descriptor(hidden, shape.operand_blocks[0]),
            matrix_descriptor(weight, shape.operand_blocks[1]),
            label_columns,
            maxima,
            sums,
            weighted_sums,
            num_rows,
            num_words,
            hidden.shape[1],
            LOG2_E / temperature,
            NO_WORD=NO_WORD,
            WITH_ENTROPY=with_entropy,
            **shape.constants(),
        )
    return maxima, sums, weighted_sums
