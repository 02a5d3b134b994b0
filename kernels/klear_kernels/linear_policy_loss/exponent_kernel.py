"""Exponentials of the logits relative to a reference per row, in bfloat16, with their row sums in float32.

With the reference known before the product, no tile depends on another: the gradient's products take the
exponentials as they are, and only a factor per row is missing, which follows from the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from klear_kernels.triton_tiles import (
    LOG2_E,
    aligned,
    launching_on,
    matrix_descriptor,
    store_tile,
    tile_position,
    tile_product,
    tile_shape,
)

LARGEST_EXPONENT = 64.0
"""Powers of two are cut off here: far beyond what a valid reference gives, and finite in every sum that follows."""


@triton.jit(
    do_not_specialize=["num_rows", "num_words", "size", "scale"],
    do_not_specialize_on_alignment=["label_columns", "reference", "sums", "weighted_sums"],
)
def exponent_kernel(
    hidden,
    weight,
    exponentials,
    label_columns,
    reference,
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
    LARGEST: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Write e = 2^(z - reference), 0 at the label, and of each row of each tile sum e and sum e (z - reference).

    Args:
        hidden, weight, exponentials: descriptors of [num_rows, size], [num_words, size] and [num_rows, num_words].
        label_columns: int32 [num_rows], the label's column, anything else where it is not in this shard.
        reference: float32 [num_rows], in powers of two.
        sums, weighted_sums: float32 [word blocks, num_rows], of the exponentials before they are rounded.
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
        exponent = tl.minimum(z - tl.load(reference + rows, mask=in_rows, other=0.0)[:, None], LARGEST)
        others = (words < num_words)[None, :] & (words[None, :] != label[:, None])
        values = tl.where(others, tl.exp2(exponent), 0.0)
        target = word_block.to(tl.int64) * num_rows + rows
        tl.store(sums + target, tl.sum(values, 1), mask=in_rows)
        if WITH_ENTROPY:
            tl.store(weighted_sums + target, tl.sum(values * exponent, 1), mask=in_rows)
        store_tile(exponentials, row_block, word_block, values, BLOCK_ROWS, BLOCK_WORDS)


def exponentials_and_sums(
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    label_columns: torch.Tensor,
    reference: torch.Tensor,
    *,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write exp(z - r) without the labels' own entries; return its sums [C] and its sums weighted by z - r, nats.

    Args:
        out: bfloat16 [C, valid_rows], rows aligned.
        hidden: bfloat16 [C, H].
        weight: bfloat16 [valid_rows, H], one row or more.
        label_columns: int32 [C].
        reference: r, float32 [C], nats.
        temperature: divides the logits.
        with_entropy: whether the weighted sums are wanted; zeros where not.
    """
    shape = tile_shape(hidden.device)
    hidden, weight = aligned(hidden), aligned(weight)
    num_rows, num_words = hidden.shape[0], weight.shape[0]
    partial = hidden.new_empty(1 + with_entropy, -(-num_words // shape.words), num_rows, dtype=torch.float32)
    with launching_on(hidden.device):
        exponent_kernel[shape.grid(num_rows, num_words, hidden.device)](
            matrix_descriptor(hidden, shape.operand_blocks[0]),
            matrix_descriptor(weight, shape.operand_blocks[1]),
            matrix_descriptor(out, shape.stored_block),
            label_columns,
            reference * LOG2_E,
            partial[0],
            partial[-1],
            num_rows,
            num_words,
            hidden.shape[1],
            LOG2_E / temperature,
            LARGEST=LARGEST_EXPONENT,
            WITH_ENTROPY=with_entropy,
            **shape.constants(),
        )
    sums = partial[0].sum(0)
    return sums, partial[1].sum(0) / LOG2_E if with_entropy else torch.zeros_like(sums)
