"""Gradients of the logits from recomputed logits, written in bfloat16 as the products after it take them."""

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


@triton.jit(
    do_not_specialize=["num_rows", "num_words", "size", "scale"],
    do_not_specialize_on_alignment=["logsumexp", "constant", "slope"],
)
def gradient_kernel(
    hidden,
    weight,
    gradient,
    logsumexp,
    constant,
    slope,
    num_rows,
    num_words,
    size,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Write p (constant + slope log2 p) in bfloat16, p = 2^(z - logsumexp).

    Args:
        hidden, weight, gradient: descriptors of [num_rows, size], [num_words, size] and [num_rows, num_words].
        logsumexp: float32 [num_rows], of z.
        constant, slope: float32 [num_rows]; the slope is read only WITH_ENTROPY.
        scale: what products are multiplied by to become z, the logits over the temperature in powers of two.
    """
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tl.cdiv(num_words, BLOCK_WORDS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_block, word_block = tile_position(tile, num_rows, num_words, BLOCK_ROWS, BLOCK_WORDS, GROUP_ROWS)
        z = tile_product(hidden, weight, row_block, word_block, size, BLOCK_ROWS, BLOCK_WORDS, BLOCK_HIDDEN) * scale
        rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < num_rows
        log_probability = z - tl.load(logsumexp + rows, mask=in_rows, other=0.0)[:, None]
        factor = tl.load(constant + rows, mask=in_rows, other=0.0)[:, None]
        if WITH_ENTROPY:
            factor += tl.load(slope + rows, mask=in_rows, other=0.0)[:, None] * log_probability
        values = tl.exp2(log_probability) * factor
        store_tile(gradient, row_block, word_block, values, BLOCK_ROWS, BLOCK_WORDS)


def logit_gradient(
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor | None,
    *,
    temperature: float,
) -> torch.Tensor:
    """Write the gradient of the raw logits, all but the labels' own entries, and return it.

    Equation: dz_j = [-g p_j - h p_j (log p_j + entropy)] / temperature.

    Args:
        out: bfloat16 [C, valid_rows], rows aligned.
        hidden: bfloat16 [C, H].
        weight: bfloat16 [valid_rows, H], one row or more.
        logsumexp: float32 [C], nats.
        grad_logprobs, grad_entropy: g and h, float32 [C].
        entropy: float32 [C], nats.
        temperature: divides the logits.
    """
    shape = tile_shape(hidden.device)
    hidden, weight = aligned(hidden), aligned(weight)
    num_rows, num_words = hidden.shape[0], weight.shape[0]
    constant = slope = -grad_logprobs / temperature
    with_entropy = grad_entropy is not None and entropy is not None
    if grad_entropy is not None and entropy is not None:
        constant = constant - grad_entropy * entropy / temperature
        slope = -grad_entropy / (temperature * LOG2_E)
    with launching_on(hidden.device):
        gradient_kernel[shape.grid(num_rows, num_words, hidden.device)](
            matrix_descriptor(hidden, shape.operand_blocks[0]),
            matrix_descriptor(weight, shape.operand_blocks[1]),
            matrix_descriptor(out, shape.stored_block),
            logsumexp * LOG2_E,
            constant,
            slope,
            num_rows,
            num_words,
            hidden.shape[1],
            LOG2_E / temperature,
            WITH_ENTROPY=with_entropy,
            **shape.constants(),
        )
    return out
