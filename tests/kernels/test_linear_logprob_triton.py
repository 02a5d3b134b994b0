"""linear_logprob's Triton backend against float64 of the same bfloat16 inputs, as near as rounding allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klear_kernels import LogprobOutput, linear_logprob
from klear_kernels.linear_logprob.reference import reference_logprob

IGNORED = -100


def make_inputs(
    device: torch.device, tokens: int = 45, words: int = 83, size: int = 24, seed: int = 0, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 hidden states and weight, labels with about every fourth one ignored; `scale` spreads the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator)
    weight = torch.randn(words, size, generator=generator) * (scale / math.sqrt(size))
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.25] = IGNORED
    return (
        hidden.bfloat16().to(device).requires_grad_(),
        weight.bfloat16().to(device).requires_grad_(),
        labels.to(device),
    )


def run(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **settings: Any) -> LogprobOutput:
    return linear_logprob(hidden, weight, labels, backend="triton", **settings)


def upstream_for(tokens: int, device: torch.device, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, generator=generator).to(device) for _ in range(2))  # type: ignore[return-value]


def gradients(output: LogprobOutput, inputs: tuple[torch.Tensor, ...], *upstream: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the sum of upstream * output, logprobs first, then entropy if a second upstream is given."""
    total = (output.logprobs * upstream[0].to(output.logprobs.dtype)).sum()
    if len(upstream) > 1:
        assert output.entropy is not None
        total = total + (output.entropy * upstream[1].to(output.entropy.dtype)).sum()
    return [gradient.double() for gradient in torch.autograd.grad(total, inputs, retain_graph=True)]


def exact_copies(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """float64 leaves of the same values, so that their gradients are not rounded either."""
    return tuple(tensor.detach().double().requires_grad_() for tensor in inputs)


def rounded_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    upstream: tuple[torch.Tensor, ...],
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """What bfloat16 allows at best: exact gradients of exact logits rounded, multiplied exactly, results rounded."""
    keep = labels != IGNORED
    x, w = hidden.detach().double()[keep], weight.detach().double()
    logits = (x @ w.t()).requires_grad_()
    rows = torch.log_softmax(logits / temperature, -1)
    total = (rows.gather(1, labels[keep].unsqueeze(1)).squeeze(1) * upstream[0][keep].double()).sum()
    if len(upstream) > 1:
        total = total - ((rows.exp() * rows).sum(1) * upstream[1][keep].double()).sum()
    gradient = torch.autograd.grad(total, logits)[0].bfloat16().double()
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float64)
    grad_hidden[keep] = (gradient @ w).bfloat16().double()
    return [grad_hidden, (gradient.t() @ x).bfloat16().double()]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(
    ("tokens", "words", "size"),
    [(1, 2, 8), (45, 83, 24), (64, 128, 16), (17, 33, 20), (16, 31, 1), (5, 300, 40)],
)
def test_values_and_gradients(
    triton_device: torch.device, tokens: int, words: int, size: int, temperature: float
) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens, words, size)
    labels[0] = words - 1
    got = run(hidden, weight, labels, temperature=temperature)
    exact_inputs = exact_copies(hidden, weight)
    want = reference_logprob(*exact_inputs, labels, temperature=temperature)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = upstream_for(tokens, triton_device)
    for columns in (upstream, upstream[:1]):
        base = rounded_gradients(hidden, weight, labels, columns, temperature)
        ours, theirs = gradients(got, (hidden, weight), *columns), gradients(want, exact_inputs, *columns)
        for mine, rounded, exact in zip(ours, base, theirs, strict=True):
            assert relative_error(mine, exact) <= 1.5 * relative_error(rounded, exact)


@pytest.mark.parametrize("words", [2, 83, 96, 97])
def test_ragged_vocabularies_by_hand(triton_device: torch.device, words: int) -> None:
    # The last two logits are 2, the others 0: all probabilities follow by counting.
    hidden = torch.ones(3, 8, dtype=torch.bfloat16, device=triton_device)
    weight = torch.zeros(words, 8, dtype=torch.bfloat16, device=triton_device)
    weight[-2:, 0] = 2.0
    got = run(hidden, weight, torch.tensor([words - 1, 0, IGNORED], device=triton_device))
    lse = math.log(2 * math.exp(2.0) + words - 2)
    zero_logit = 2.0 if words == 2 else 0.0
    assert got.logsumexp.tolist() == pytest.approx([lse, lse, 0.0], rel=1e-6)
    assert got.logprobs.tolist() == pytest.approx([2.0 - lse, zero_logit - lse, 0.0], rel=1e-6)


def test_what_lies_behind_the_valid_rows_is_never_read(triton_device: torch.device) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=40, words=70)
    labels = torch.where(labels >= 53, 52, labels)
    exact_inputs = exact_copies(hidden, weight)
    want = reference_logprob(*exact_inputs, labels, vocab_size=53)
    upstream = upstream_for(40, triton_device)
    want_gradients = gradients(want, exact_inputs, *upstream)
    with torch.no_grad():
        weight[53:] = float("nan")  # padded vocabulary
        hidden[labels == IGNORED] = float("nan")  # and tokens that are not computed
    got = run(hidden, weight, labels, vocab_size=53, chunk_tokens=13)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-5)
    grad_hidden, grad_weight = gradients(got, (hidden, weight), *upstream)
    assert not grad_weight[53:].any()
    assert not grad_hidden[labels == IGNORED].any()
    for mine, exact in zip((grad_hidden, grad_weight), want_gradients, strict=True):
        assert relative_error(mine, exact) < 2 * 2.0**-9


def test_results_do_not_depend_on_the_chunk_size_and_reruns_are_equal(triton_device: torch.device) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=30, words=70, size=16)
    upstream = upstream_for(30, triton_device)
    want = run(hidden, weight, labels, chunk_tokens=30)
    want_gradients = gradients(want, (hidden, weight), *upstream)
    for chunk_tokens in (2, 7, 29, None):
        got, again = (run(hidden, weight, labels, chunk_tokens=chunk_tokens) for _ in range(2))
        for ours, theirs in zip(got, again, strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-6, atol=1e-6)
        ours = gradients(got, (hidden, weight), *upstream)
        for mine, first, second in zip(
            ours, want_gradients, gradients(again, (hidden, weight), *upstream), strict=True
        ):
            assert torch.equal(mine, second)
            assert relative_error(mine, first) <= 2 * 2.0**-9


def test_confident_tokens_keep_their_relative_precision(triton_device: torch.device) -> None:
    # One word wins by 8 to 24 nats: 1 - p_y from 1e-2 to 1e-9, where float32 `p_y - 1` becomes noise, then 0.
    size, words = 16, 40
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(words, size, generator=generator) * 0.1
    weight[:, 0] = 0.0
    weight[17, 0] = 1.0
    hidden = torch.randn(17, size, generator=generator)
    hidden[:, 0] = torch.arange(8.0, 25.0)
    labels = torch.full((17,), 17, device=triton_device)
    hidden = hidden.bfloat16().to(triton_device).requires_grad_()
    weight = weight.bfloat16().to(triton_device).requires_grad_()
    exact_inputs = exact_copies(hidden, weight)
    got, want = run(hidden, weight, labels), reference_logprob(*exact_inputs, labels)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=3e-5, atol=0.0)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=3e-5, atol=0.0)
    ones = torch.ones(17, device=triton_device)
    ours, theirs = gradients(got, (hidden,), ones)[0], gradients(want, exact_inputs[:1], ones)[0]
    worst_row = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()
    assert float(worst_row) <= 2 * 2.0**-9  # the gradient of the logits and the result, each rounded once


@pytest.mark.parametrize("offset", [-1e4, -100.0, 100.0, 1e4])
def test_far_from_zero_logits(triton_device: torch.device, offset: float) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=18, words=40)
    with torch.no_grad():
        hidden[:, 0] = 1.0
        weight[:, 0] = offset
    exact_inputs = exact_copies(hidden, weight)
    got, want = run(hidden, weight, labels), reference_logprob(*exact_inputs, labels)
    rounding = 8 * abs(offset) * 2.0**-23  # float32 logits of that size, and their powers of two
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=rounding + 1e-5)
    ones = torch.ones(18, device=triton_device)
    ours, theirs = gradients(got, (hidden, weight), ones), gradients(want, exact_inputs, ones)
    for mine, exact in zip(ours, theirs, strict=True):
        assert bool(mine.isfinite().all())
        assert relative_error(mine[:, 1:], exact[:, 1:]) < rounding + 2 * 2.0**-9


def test_improbable_label_and_vocabulary_of_one_word(triton_device: torch.device) -> None:
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, device=triton_device, requires_grad=True)
    weight = torch.tensor([[0.0], [-500.0], [-1.0]], dtype=torch.bfloat16, device=triton_device, requires_grad=True)
    label = torch.tensor([1], device=triton_device)
    exact_inputs = exact_copies(hidden, weight)
    got, want = run(hidden, weight, label), reference_logprob(*exact_inputs, label)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-6, atol=0.0)
    one = torch.ones(1, device=triton_device)
    for mine, exact in zip(gradients(got, (hidden, weight), one), gradients(want, exact_inputs, one), strict=True):
        assert relative_error(mine, exact) <= 2 * 2.0**-9
    alone = run(hidden, weight[:1], torch.tensor([0], device=triton_device))
    assert [column.tolist() for column in alone] == [[0.0], [0.0], [0.0]]


def test_nothing_to_compute_gives_zeros_still_in_the_graph(triton_device: torch.device) -> None:
    for tokens in (0, 6):
        hidden, weight, _ = make_inputs(triton_device, tokens=tokens, words=10)
        got = run(hidden, weight, torch.full((tokens,), IGNORED, device=triton_device))
        assert not got.logprobs.any()
        (got.logprobs.sum() + got.entropy.sum()).backward()
        assert hidden.grad.shape == hidden.shape
        assert not hidden.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_hidden_states_are_seen(triton_device: torch.device, value: float) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=6, words=40)
    labels[:] = 1
    with torch.no_grad():
        hidden[2, 1] = value
    got = run(hidden, weight, labels)
    assert bool(got.logprobs[2].isnan())
    assert bool(got.logprobs[[0, 1, 3, 4, 5]].isfinite().all())


def test_operands_that_no_descriptor_holds_are_copied(triton_device: torch.device) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=20, words=40, size=24)
    want = run(hidden, weight, labels)
    odd = torch.zeros(20, 27, dtype=torch.bfloat16, device=triton_device)[:, 2:26]
    odd.copy_(hidden.detach())
    across = weight.detach().t().contiguous().t()
    got = run(odd, across, labels)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tokens_without_upstream_cost_nothing_and_get_nothing(triton_device: torch.device) -> None:
    hidden, weight, labels = make_inputs(triton_device, tokens=30, words=40)
    labels[:] = 3
    upstream = torch.zeros(30, device=triton_device)
    upstream[[4, 21]] = 1.0
    output = run(hidden, weight, labels)
    grad_hidden, _ = gradients(output, (hidden, weight), upstream)
    assert grad_hidden.abs().sum(1).nonzero().squeeze(1).tolist() == [4, 21]
    without = run(hidden, weight, labels, with_entropy=False)
    assert without.entropy is None
    torch.testing.assert_close(without.logprobs, output.logprobs, rtol=0, atol=0)


def test_weight_gradient_into_main_grad(triton_device: torch.device) -> None:
    hidden, weight, labels = make_inputs(triton_device)
    upstream = upstream_for(45, triton_device)
    exact_inputs = exact_copies(hidden, weight)
    want = gradients(reference_logprob(*exact_inputs, labels), exact_inputs, *upstream)[1]
    weight.main_grad = torch.full(weight.shape, 0.5, device=triton_device)
    for _ in range(2):
        output = run(hidden, weight, labels, into_main_grad=True, chunk_tokens=16)
        ((output.logprobs * upstream[0]).sum() + (output.entropy * upstream[1]).sum()).backward()
    assert weight.grad is None
    assert relative_error(weight.main_grad - 0.5, 2 * want) <= 1.5 * 2.0**-9


class _LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of any tensor made while it is on."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_stores_no_logits_going_forward_and_a_chunk_going_back(triton_device: torch.device) -> None:
    tokens, words, chunk = 60, 520, 16
    hidden, weight, labels = make_inputs(triton_device, tokens=tokens, words=words, size=8)
    labels[:] = 0
    with _LargestTensor() as largest:
        output = run(hidden, weight, labels, chunk_tokens=tokens)
    assert largest.bytes < tokens * words * 2 / 4  # three float32 sums for each 32 words; logits would be 2 bytes each
    output = run(hidden, weight, labels, chunk_tokens=chunk)
    with _LargestTensor() as largest:
        gradients(output, (hidden, weight), *upstream_for(tokens, triton_device))
    assert chunk * words * 2 <= largest.bytes <= chunk * words * 4  # bfloat16, widened where the device cannot mix


def test_token_offsets_past_31_bits(triton_device: torch.device) -> None:
    # Pages of zeros that are never touched cost nothing on a CPU, so that the last token may lie far out.
    size = 4096
    tokens = 2**31 // size + 3
    if triton_device.type == "cpu":
        import numpy

        hidden = torch.from_numpy(numpy.zeros((tokens, size), dtype=numpy.uint16)).view(torch.bfloat16)
    else:
        hidden = torch.zeros(tokens, size, dtype=torch.bfloat16, device=triton_device)
    generator = torch.Generator().manual_seed(0)
    hidden[-1] = torch.randn(size, generator=generator).to(triton_device)
    weight = (torch.randn(40, size, generator=generator) * 0.05).bfloat16().to(triton_device)
    labels = torch.full((tokens,), IGNORED, device=triton_device)
    labels[-1] = 7
    with torch.no_grad():
        got = run(hidden, weight, labels)
    want = reference_logprob(hidden[-1:], weight, labels[-1:])
    assert float(want.logprobs.abs()) > 0.1
    torch.testing.assert_close(got.logprobs[-1:].double(), want.logprobs, rtol=1e-5, atol=1e-5)
