"""The logit of each row's label, by one dot product per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from klear_kernels.triton_tiles import launching_on

BLOCK = 1024


@triton.jit(
    do_not_specialize=["hidden_stride", "weight_stride", "size", "scale"],
    do_not_specialize_on_alignment=["hidden", "weight", "tokens", "label_columns", "out"],
)
def label_logit_kernel(
    hidden, weight, tokens, label_columns, out, hidden_stride, weight_stride, size, scale, BLOCK: tl.constexpr
):
    """out[i] = scale * hidden[tokens[i]] . weight[label_columns[i]], 0 where the column is negative."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(label_columns + row).to(tl.int64)
    left = hidden + tl.load(tokens + row) * hidden_stride
    right = weight + column * weight_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = (position < size) & (column >= 0)
        x = tl.load(left + position, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(right + position, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0) * scale)


def label_logits(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, label_columns: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Logits over the temperature, float32 [K], of the labels that are in this shard, 0 for the others.

    Args:
        hidden: bfloat16 [T, H].
        weight: bfloat16 [valid_rows, H].
        tokens: int64 [K], rows of `hidden`.
        label_columns: int32 [K], rows of `weight`, negative where the label is in another shard.
        temperature: divides the logits.
    """
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    out = hidden.new_empty(tokens.shape[0], dtype=torch.float32)
    if tokens.shape[0] == 0:
        return out
    with launching_on(hidden.device):
        label_logit_kernel[(tokens.shape[0],)](
            hidden,
            weight,
            tokens,
            label_columns,
            out,
            hidden.stride(0),
            weight.stride(0),
            hidden.shape[1],
            1.0 / temperature,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out
