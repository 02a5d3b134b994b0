"""The row pass and the products of csrc/, element by element against float64."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

CudaPart = tuple[Any, torch.device]
UNIT = 2.0**-24
NAN = float("nan")


def buffer_of(logits: torch.Tensor) -> torch.Tensor:
    """A [C, stride] buffer of the logits, its padding poisoned."""
    columns = -(-logits.shape[1] // 64) * 64
    rows = torch.full((logits.shape[0], columns), NAN)
    rows[:, : logits.shape[1]] = logits
    return rows


def check_row_pass(part: CudaPart, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Run it on float32 [C, words] logits and compare all it returns with float64."""
    module, device = part
    words = logits.shape[1]
    rows = buffer_of(logits).to(device)
    untouched = module.row_pass(rows, words, labels.to(device), False)
    assert torch.equal(rows[:, :words].cpu(), logits)
    results = module.row_pass(rows, words, labels.to(device), True)
    for first, second in zip(untouched, results, strict=True):
        assert torch.equal(first, second)
    row_max, label_gap, partials = (tensor.cpu() for tensor in results)

    exact = logits.double()
    top = exact.max(dim=1).values
    gap = exact - top.unsqueeze(1)
    exponentials = gap.exp()
    assert torch.equal(row_max.double(), top)
    picked = gap.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(label_gap.double(), torch.where(labels >= 0, picked, 0.0), rtol=2 * UNIT, atol=0.0)

    # z - m is rounded once, which the exponential makes relative: |gap| units; then about 50 additions in a row.
    relative = (float(gap.abs().max()) + 50) * UNIT
    sums = partials.double().sum(dim=1)
    count = (gap == 0).sum(dim=1)
    assert torch.equal(sums[:, 1], count.double())
    rest = torch.where(gap == 0, 0.0, exponentials).sum(dim=1)
    torch.testing.assert_close(sums[:, 0], rest, rtol=relative, atol=0.0)
    torch.testing.assert_close(sums[:, 2], (exponentials * gap).sum(dim=1), rtol=2 * relative, atol=0.0)

    written = rows.cpu().view(torch.bfloat16)[:, :words].double()
    assert bool(((written - exponentials).abs() <= exponentials * (2.0**-8 + relative)).all())


@pytest.mark.parametrize("words", [1, 2, 3, 4, 63, 64, 2049, 4096, 8193, 18992, 20480, 20481, 37984])
def test_row_pass_of_ragged_widths(cuda_part: CudaPart, words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = torch.randn(4, words, generator=generator) * 4
    labels = torch.tensor([words - 1, 0, -1, words // 2])
    check_row_pass(cuda_part, logits, labels)


def test_row_pass_of_the_whole_vocabulary(cuda_part: CudaPart) -> None:
    logits = torch.randn(1, 151936, generator=torch.Generator().manual_seed(0)) * 4
    check_row_pass(cuda_part, logits, torch.tensor([151935]))


def test_largest_logit_anywhere_and_more_than_once(cuda_part: CudaPart) -> None:
    # 40,000 words are four blocks of ten thousand: the maximum in the first, the last, and in several at once.
    logits = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(1))
    logits[0, 0] = logits[1, 39_999] = 9.0
    logits[2, [5, 10_003, 39_998]] = 9.0
    logits[3] -= 60.0  # all negative
    check_row_pass(cuda_part, logits, torch.tensor([0, 39_999, 10_003, 17]))


def test_row_that_is_not_finite_is_seen_and_alone(cuda_part: CudaPart) -> None:
    module, device = cuda_part
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    logits[1, 299] = NAN
    row_max, label_gap, partials = module.row_pass(
        buffer_of(logits).to(device), 300, torch.zeros(3, dtype=torch.int64, device=device), True
    )
    sums = partials.sum(dim=1)
    assert bool(sums[1, 0].isnan())
    assert bool(sums[[0, 2]].isfinite().all())
    assert bool(row_max[[0, 2]].isfinite().all())
    assert bool(label_gap[[0, 2]].isfinite().all())


def test_offsets_past_two_to_the_31(emulated_cuda: Any) -> None:
    words, stride = 100, 2**31 + 64  # the second row begins more than 2^31 elements after the first
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * stride * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    rows = torch.frombuffer(memory, dtype=torch.float32).view(2, stride)
    logits = torch.randn(2, words, generator=torch.Generator().manual_seed(3))
    rows[:, :words] = logits
    row_max, _, partials = emulated_cuda.row_pass(rows, words, torch.tensor([1, 2]), True)
    assert torch.equal(row_max, logits.max(dim=1).values)
    exponentials = (logits - row_max.unsqueeze(1)).exp()
    torch.testing.assert_close(partials.sum(dim=(1, 2)) - partials[:, :, 2].sum(1), exponentials.sum(dim=1))
    assert torch.equal(rows[1, : words // 2].view(torch.bfloat16), exponentials[1].bfloat16())


def test_blocks_per_row(emulated_cuda: Any) -> None:
    widths = {1: 1, 18_992: 1, 20_480: 1, 20_481: 2, 37_984: 2, 75_968: 4, 151_936: 8, 163_840: 8, 163_841: 0, 0: 0}
    assert {words: emulated_cuda.row_pass_blocks(words) for words in widths} == widths


@pytest.mark.parametrize(
    ("words", "stride", "message"),
    [(163_841, 163_904, "words: the row pass takes 1 to 163,840"), (5, 6, "stride: must be a multiple of 4")],
)
def test_what_the_row_pass_cannot_do_is_refused(emulated_cuda: Any, words: int, stride: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated_cuda.row_pass(torch.zeros(1, stride), words, torch.tensor([0]), True)


@pytest.mark.parametrize(("tokens", "size", "words"), [(1, 8, 3), (5, 16, 70), (32, 24, 129)])
def test_products(cuda_part: CudaPart, tokens: int, size: int, words: int) -> None:
    module, device = cuda_part
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = torch.randn(tokens, size, generator=generator), torch.randn(words, size, generator=generator)
    hidden, weight = hidden.bfloat16().to(device), weight.bfloat16().to(device)
    rows = buffer_of(torch.full((tokens, words), NAN)).to(device)

    def close(got: torch.Tensor, want: torch.Tensor, inner: int, magnitude: torch.Tensor) -> None:
        # exact products of bfloat16, summed in float32
        assert got.shape == want.shape
        assert bool(((got.double() - want).abs() <= (inner + 2) * UNIT * magnitude).all())

    module.logits_product(rows, hidden, weight, 0.7)
    want = 0.7 * hidden.double() @ weight.double().t()
    close(rows[:, :words], want, size, hidden.double().abs() @ weight.double().abs().t())

    exponentials = torch.rand(tokens, words, generator=generator).bfloat16().to(device)
    rows.fill_(NAN)
    rows.view(torch.bfloat16)[:, :words] = exponentials
    close(
        module.hidden_product(rows, weight),
        exponentials.double() @ weight.double(),
        words,
        exponentials.double() @ weight.double().abs(),
    )

    gradient = torch.randn(words, size, generator=generator).to(device)
    want = gradient.double() + exponentials.double().t() @ hidden.double()
    magnitude = gradient.double().abs() + exponentials.double().t() @ hidden.double().abs()
    module.add_weight_product(gradient, rows, hidden)
    close(gradient, want, tokens + 1, magnitude)
