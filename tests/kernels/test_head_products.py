"""The mixed-precision products of a GPU, played by exact products of bfloat16 operands, against the widening path."""

from __future__ import annotations

import pytest
import torch

from klear_kernels import head_products, linear_logprob
from klear_kernels.linear_logprob.reference import reference_logprob


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("block_rows", [16384, 13])
def test_mixed_products_round_only_the_gradient_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, in_place: bool
) -> None:
    def exact_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        return left.float() @ right.float()

    monkeypatch.setattr(head_products, "has_mixed_products", lambda device_type, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(head_products, "mixed_product", exact_product)
    monkeypatch.setattr(head_products, "has_mixed_accumulation", lambda device_type: in_place)
    monkeypatch.setattr(
        head_products, "add_mixed_product_", lambda total, left, right: total.add_(exact_product(left, right))
    )
    monkeypatch.setattr(head_products, "_MIXED_BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(60, 16, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 60, (40,), generator=generator)
    got, want = (
        linear_logprob(hidden, weight, labels, chunk_tokens=12),
        reference_logprob(hidden, weight, labels),
    )
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(output.logprobs.sum(), (hidden, weight)) for output in (got, want))
    for mine, exact in zip(ours, theirs, strict=True):
        # two roundings to 8 bits: the gradient of the logits, and the result
        assert relative_error(mine, exact) < 2 * 2.0**-9


@pytest.mark.gpu
def test_a_product_is_added_in_place_on_a_gpu() -> None:
    """Without a second copy of the sum: at full size that is 2.5 GB."""
    device = torch.device("cuda")
    assert head_products.has_mixed_products("cuda", torch.bfloat16)
    assert head_products.has_mixed_accumulation("cuda")
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(4096, 256, generator=generator, device=device).bfloat16()
    right = torch.randn(256, 4096, generator=generator, device=device).bfloat16()
    total = torch.full((4096, 4096), 0.5, device=device)
    head_products.add_mixed_product_(total, left, right)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_products.add_mixed_product_(total, left, right)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < total.numel() * 4 // 2
    want = 0.5 + 2 * (left.double() @ right.double())
    assert relative_error(total, want) < 1e-6


def test_probe_says_no_on_a_cpu() -> None:
    assert not head_products.has_mixed_accumulation("cpu")
    assert not head_products.has_mixed_products("cpu", torch.bfloat16)
    assert not head_products.has_mixed_products("cpu", torch.float32)


def test_widening_by_blocks_of_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "_CAST_BYTES", 1)
    hidden = torch.randn(5, 8).bfloat16().requires_grad_()
    weight = torch.randn(11, 8).bfloat16().requires_grad_()
    labels = torch.arange(5)
    got, want = linear_logprob(hidden, weight, labels), reference_logprob(hidden, weight, labels)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(output.logprobs.sum(), (hidden, weight)) for output in (got, want))
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative_error(mine, exact) < 2.0**-9
