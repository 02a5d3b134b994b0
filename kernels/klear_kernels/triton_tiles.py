"""Tiles of hidden @ weight.T in Triton: their sizes, the order they are taken in, and the product of one.

The kernels that use them are persistent: as many programs as there are multiprocessors each take every so manieth
tile. The loop over tiles is flattened into the loop over the hidden size, so that the loads of the next tile are on
their way while the exponents of this one are computed.

No kernel is specialised on a number or on the alignment of a pointer: how many tokens are computed differs from call to
call, and offsets into shared buffers with it, so that a new variant would be compiled in the middle of training.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
"""Kernels work with powers of two, which the hardware computes."""

_ALIGNMENT_BYTES = 16
"""What the tensor memory accelerator asks of addresses and row strides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """How a kernel cuts the product.

    Attributes:
        rows, words, hidden: sizes of a block of tokens, of vocabulary, and of the summed dimension.
        group_rows: blocks of tokens that are taken together, so that they share the weight in the L2 cache.
        num_warps, num_stages: warps of a program, and blocks on their way from memory.
    """

    rows: int
    words: int
    hidden: int
    group_rows: int
    num_warps: int
    num_stages: int

    def grid(self, num_rows: int, num_words: int, device: torch.device) -> tuple[int]:
        """One program per multiprocessor, or per tile where there are fewer."""
        return (min(-(-num_rows // self.rows) * -(-num_words // self.words), _num_multiprocessors(device)),)

    @property
    def operand_blocks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Blocks that descriptors of hidden states and of the weight are read in."""
        return (self.rows, self.hidden), (self.words, self.hidden)

    @property
    def stored_block(self) -> tuple[int, int]:
        """Block that `store_tile` writes."""
        return self.rows, self.words // 2

    def constants(self) -> dict[str, int]:
        """What every kernel over tiles takes by name."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_WORDS": self.words,
            "BLOCK_HIDDEN": self.hidden,
            "GROUP_ROWS": self.group_rows,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


HOPPER = TileShape(rows=128, words=256, hidden=64, group_rows=8, num_warps=8, num_stages=4)
"""Half of each thread's registers hold the product; blocks on their way and half a tile on its way out take 224 KiB."""

INTERPRETED = TileShape(rows=16, words=32, hidden=16, group_rows=2, num_warps=4, num_stages=1)
"""On CPU tensors: small, so that small problems have ragged edges and many tiles."""


def tile_shape(device: torch.device) -> TileShape:
    """The shape for a device; a CPU means the interpreter."""
    return INTERPRETED if device.type == "cpu" else HOPPER


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # any number: the interpreter runs programs one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def aligned(matrix: torch.Tensor) -> torch.Tensor:
    """Return `matrix` [A, B] if a descriptor can hold it, else a copy with zero columns added."""
    multiple = _ALIGNMENT_BYTES // matrix.element_size()
    fits = matrix.stride(1) == 1 and matrix.stride(0) % multiple == 0 and matrix.data_ptr() % _ALIGNMENT_BYTES == 0
    if fits and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    copy = matrix.new_zeros(matrix.shape[0], -(-matrix.shape[1] // multiple) * multiple)
    copy[:, : matrix.shape[1]] = matrix
    return copy


def matrix_descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Describe an aligned matrix: beyond its edges reads give zeros and writes are dropped."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], list(block))


@triton.jit
def tile_position(
    tile, num_rows, num_words, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr, GROUP_ROWS: tl.constexpr
):
    """Block of tokens and block of words of a tile; GROUP_ROWS blocks of tokens go along the vocabulary together."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    tiles_per_group = GROUP_ROWS * tl.cdiv(num_words, BLOCK_WORDS)
    first = tile // tiles_per_group * GROUP_ROWS
    height = tl.minimum(row_blocks - first, GROUP_ROWS)
    inside = tile % tiles_per_group
    return first + inside % height, inside // height


@triton.jit
def tile_product(
    hidden,
    weight,
    row_block,
    word_block,
    size,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """float32 [BLOCK_ROWS, BLOCK_WORDS] product of bfloat16 blocks of two descriptors."""
    product = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.float32)
    for block in tl.range(0, tl.cdiv(size, BLOCK_HIDDEN)):
        left = hidden.load([row_block * BLOCK_ROWS, block * BLOCK_HIDDEN])
        right = weight.load([word_block * BLOCK_WORDS, block * BLOCK_HIDDEN])
        product = tl.dot(left, right.T, product)
    return product


@triton.jit
def store_tile(target, row_block, word_block, values, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """Write a tile in bfloat16, one half after the other, so that shared memory need hold only a half."""
    halves = values.to(tl.bfloat16).reshape(BLOCK_ROWS, 2, BLOCK_WORDS // 2).permute(0, 2, 1)
    left, right = halves.split()
    target.store([row_block * BLOCK_ROWS, word_block * BLOCK_WORDS], left)
    target.store([row_block * BLOCK_ROWS, word_block * BLOCK_WORDS + BLOCK_WORDS // 2], right)
