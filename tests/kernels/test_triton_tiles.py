"""Tiles are taken once each, and operands are copied only where a descriptor could not hold them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from klear_kernels.triton_tiles import HOPPER, aligned, launching_on, tile_position


@triton.jit
def visit_kernel_of_test(visits, num_rows, num_words, num_tiles, GROUP_ROWS: tl.constexpr):
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row_block, word_block = tile_position(tile, num_rows, num_words, 16, 32, GROUP_ROWS)
        where = visits + row_block * tl.cdiv(num_words, 32) + word_block
        tl.store(where, tl.load(where) + 1)


@pytest.mark.parametrize(("num_rows", "num_words"), [(1, 1), (16, 32), (17, 33), (100, 70), (33, 300)])
@pytest.mark.parametrize("group_rows", [1, 2, 8])
def test_every_tile_once(triton_device: torch.device, num_rows: int, num_words: int, group_rows: int) -> None:
    shape = (-(-num_rows // 16), -(-num_words // 32))
    visits = torch.zeros(shape, dtype=torch.int32, device=triton_device)
    with launching_on(visits.device):
        visit_kernel_of_test[(3,)](visits, num_rows, num_words, visits.numel(), GROUP_ROWS=group_rows)
    assert bool((visits == 1).all())


def test_aligned() -> None:
    matrix = torch.arange(60, dtype=torch.float32).reshape(5, 12).bfloat16()
    wide = torch.zeros(5, 24, dtype=torch.bfloat16)
    for fits in (wide, wide[:, 8:], wide[1:], wide[:, :3], matrix.new_zeros(1, 16)):
        assert aligned(fits) is fits
    for odd in (matrix, wide[:, 1:9], wide.t(), matrix[:1].expand(4, 12), matrix[:, :8]):
        copy = aligned(odd)
        assert copy.stride(1) == 1
        assert copy.stride(0) % 8 == 0
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy[:, : odd.shape[1]], odd)
        assert not copy[:, odd.shape[1] :].any()


def test_an_accumulator_leaves_registers_for_its_exponents() -> None:
    """65536 registers per multiprocessor, 255 at most per thread: half of a thread's hold the product."""
    assert HOPPER.rows * HOPPER.words == 128 * HOPPER.num_warps * 32
