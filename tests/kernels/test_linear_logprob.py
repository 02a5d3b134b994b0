"""linear_logprob against full float64 logits, and where a shortcut would go wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klear_kernels import LogprobOutput, linear_logprob
from klear_kernels.linear_logprob.reference import reference_logprob

IGNORED = -100


def make_inputs(
    tokens: int, words: int, size: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels; about every fourth label ignored; `scale` spreads the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(words, size, generator=generator, dtype=torch.float64) * (scale / math.sqrt(size))
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.25] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def upstream_for(tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator)


def gradients(output: LogprobOutput, inputs: tuple[torch.Tensor, ...], *upstream: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the sum of upstream * output, logprobs first, then entropy if a second upstream is given."""
    total = (output.logprobs * upstream[0].to(output.logprobs.dtype)).sum()
    if len(upstream) > 1:
        assert output.entropy is not None
        total = total + (output.entropy * upstream[1].to(output.entropy.dtype)).sum()
    return [gradient.double() for gradient in torch.autograd.grad(total, inputs)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(("tokens", "words", "size"), [(1, 2, 1), (37, 53, 16), (64, 128, 8)])
def test_float64_equals_full_logits(tokens: int, words: int, size: int, temperature: float) -> None:
    hidden, weight, labels = make_inputs(tokens, words, size, torch.float64, scale=3.0)
    labels[0] = words - 1
    got = linear_logprob(hidden, weight, labels, temperature=temperature, chunk_tokens=7)
    want = reference_logprob(hidden, weight, labels, temperature=temperature)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = upstream_for(tokens)
    for ours, theirs in zip(
        gradients(got, (hidden, weight), *upstream), gradients(want, (hidden, weight), *upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_logprobs_and_entropy() -> None:
    hidden, weight, labels = make_inputs(5, 7, 3, torch.float64)
    labels[:2] = torch.tensor([IGNORED, 6])

    def outputs(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = linear_logprob(h, w, labels, temperature=0.8, chunk_tokens=2)
        assert result.entropy is not None
        return result.logprobs, result.entropy

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_two_words_by_hand() -> None:
    # logits 0 and log 3: probabilities 1/4 and 3/4
    hidden = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    got = linear_logprob(hidden, weight, torch.tensor([0, 1]))
    assert got.entropy is not None
    torch.testing.assert_close(got.logprobs, torch.tensor([math.log(0.25), math.log(0.75)], dtype=torch.float64))
    torch.testing.assert_close(got.logsumexp, torch.full((2,), math.log(4.0), dtype=torch.float64))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(got.entropy, torch.full((2,), entropy, dtype=torch.float64))


def test_float32_is_as_good_as_full_float32_logits() -> None:
    hidden, weight, labels = make_inputs(96, 600, 32, torch.float32, scale=5.0)
    want = reference_logprob(hidden, weight, labels)
    got = linear_logprob(hidden, weight, labels, chunk_tokens=16)
    keep = labels != IGNORED
    plain_logprobs = torch.log_softmax(hidden[keep] @ weight.t(), -1).gather(1, labels[keep].unsqueeze(1)).squeeze(1)
    plain_error = relative_error(plain_logprobs, want.logprobs[keep])
    assert relative_error(got.logprobs, want.logprobs) <= 2 * plain_error
    (upstream,) = upstream_for(96)[:1]
    ours, theirs = gradients(got, (hidden, weight), upstream), gradients(want, (hidden, weight), upstream)
    plain = [
        gradient.double() for gradient in torch.autograd.grad((plain_logprobs * upstream[keep]).sum(), (hidden, weight))
    ]
    for mine, base, exact in zip(ours, plain, theirs, strict=True):
        assert relative_error(mine, exact) <= 2 * relative_error(base, exact)


def test_bfloat16_error_is_a_fraction_of_plain_bfloat16() -> None:
    hidden, weight, labels = make_inputs(128, 1000, 64, torch.bfloat16, scale=6.0)
    (upstream,) = upstream_for(128)[:1]
    keep = labels != IGNORED
    want = reference_logprob(hidden, weight, labels)
    got = linear_logprob(hidden, weight, labels, chunk_tokens=48)
    plain = torch.log_softmax((hidden[keep] @ weight.t()).float(), -1).gather(1, labels[keep].unsqueeze(1)).squeeze(1)

    worst_plain = (plain - want.logprobs[keep]).abs().max().item()
    assert got.logprobs.dtype == torch.float32
    assert worst_plain > 5e-3  # the plain computation does lose what ours must keep
    assert (got.logprobs - want.logprobs).abs().max().item() <= 0.01 * worst_plain

    ours, theirs = gradients(got, (hidden, weight), upstream), gradients(want, (hidden, weight), upstream)
    base = torch.autograd.grad((plain * upstream[keep]).sum(), (hidden, weight))
    for mine, reference, plain_gradient in zip(ours, theirs, base, strict=True):
        # bounded below by rounding the result to bfloat16, which the plain computation also does
        assert relative_error(mine, reference) <= 0.5 * relative_error(plain_gradient, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_chunk_size(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_inputs(50, 90, 16, dtype, scale=3.0)
    upstream = upstream_for(50)
    want = linear_logprob(hidden, weight, labels, chunk_tokens=50)
    want_gradients = gradients(want, (hidden, weight), *upstream)
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-9
    for chunk_tokens in (1, 7, 16, 49, 1000, None):
        got = linear_logprob(hidden, weight, labels, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
        for mine, first in zip(gradients(got, (hidden, weight), *upstream), want_gradients, strict=True):
            assert relative_error(mine, first) <= 8 * unit


def test_same_bits_on_a_rerun() -> None:
    hidden, weight, labels = make_inputs(40, 70, 16, torch.float32)
    upstream = upstream_for(40)
    runs = []
    for _ in range(2):
        output = linear_logprob(hidden, weight, labels, chunk_tokens=12)
        runs.append([*output, *gradients(output, (hidden, weight), *upstream)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_ignored_tokens_are_selected_away_whatever_they_hold() -> None:
    hidden, weight, labels = make_inputs(20, 30, 8, torch.float32)
    labels[3], labels[4] = IGNORED, 29
    ignored = labels == IGNORED
    with torch.no_grad():
        hidden[ignored] = float("nan")
    got = linear_logprob(hidden, weight, labels, chunk_tokens=6)
    grad_hidden, grad_weight = gradients(got, (hidden, weight), torch.ones(20), torch.ones(20))
    assert all(bool((column[ignored] == 0).all()) for column in got)  # 0 * NaN would be NaN
    assert bool((grad_hidden[ignored] == 0).all())
    assert bool(grad_hidden[~ignored].abs().sum(1).gt(0).all())
    assert bool(grad_weight.isfinite().all())


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_compute_gives_zeros_still_in_the_graph(tokens: int) -> None:
    hidden, weight, _ = make_inputs(tokens, 10, 4, torch.float32)
    labels = torch.full((tokens,), IGNORED)
    got = linear_logprob(hidden, weight, labels)
    assert got.entropy is not None
    assert got.logprobs.shape == got.entropy.shape == got.logsumexp.shape == (tokens,)
    assert not got.logprobs.any()
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
    assert not weight.grad.any()


def test_padded_vocabulary_rows_are_never_read() -> None:
    hidden, weight, labels = make_inputs(24, 40, 8, torch.float32)
    words = 33
    labels = torch.where(labels >= words, words - 1, labels)
    with torch.no_grad():
        weight[words:] = float("nan")
    got = linear_logprob(hidden, weight, labels, vocab_size=words, chunk_tokens=10)
    want = reference_logprob(hidden, weight, labels, vocab_size=words)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-5)
    upstream = upstream_for(24)
    grad_hidden, grad_weight = gradients(got, (hidden, weight), *upstream)
    want_hidden, want_weight = gradients(want, (hidden, weight), *upstream)
    assert not grad_weight[words:].any()
    assert relative_error(grad_hidden, want_hidden) < 1e-5
    assert relative_error(grad_weight[:words], want_weight[:words]) < 1e-5


def test_confident_tokens_keep_their_relative_precision() -> None:
    # One word wins by 8 to 24 nats: 1 - p_y from 1e-2 to 1e-9, where float32 `p_y - 1` becomes noise, then 0.
    # (Further out the float64 reference itself, which does subtract, has too few digits to compare with.)
    size, words = 12, 40
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(words, size, generator=generator) * 0.1
    weight[:, 0] = 0.0
    weight[17, 0] = 1.0
    hidden = torch.randn(17, size, generator=generator)
    hidden[:, 0] = torch.arange(8.0, 25.0)
    labels = torch.full((17,), 17)
    hidden.requires_grad_()
    weight.requires_grad_()
    got, want = linear_logprob(hidden, weight, labels), reference_logprob(hidden, weight, labels)
    assert got.entropy is not None
    assert want.entropy is not None
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=3e-5, atol=0.0)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=3e-5, atol=0.0)
    ours, theirs = (gradients(output, (hidden,), torch.ones(17))[0] for output in (got, want))
    worst_row = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()
    assert float(worst_row) < 3e-5


@pytest.mark.parametrize("offset", [-1e4, -90.0, 90.0, 1e4])
def test_far_from_zero_logits(offset: float) -> None:
    hidden, weight, labels = make_inputs(16, 21, 6, torch.float32)
    with torch.no_grad():
        hidden[:, 0] = 1.0
        weight[:, 0] = offset
    got, want = linear_logprob(hidden, weight, labels), reference_logprob(hidden, weight, labels)
    rounding = 4 * abs(offset) * 2.0**-23
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=rounding + 1e-5)
    ours, theirs = (gradients(output, (hidden, weight), torch.ones(16)) for output in (got, want))
    for mine, exact in zip(ours, theirs, strict=True):
        assert bool(mine.isfinite().all())
        assert relative_error(mine[:, 1:], exact[:, 1:]) < rounding + 1e-5


def test_improbable_label_stays_finite() -> None:
    # The label's probability underflows float32: exp(-500).
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-500.0], [-1.0]], requires_grad=True)
    got = linear_logprob(hidden, weight, torch.tensor([1]))
    want = reference_logprob(hidden, weight, torch.tensor([1]))
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-6, atol=0.0)
    ours, theirs = (gradients(output, (hidden, weight), torch.ones(1)) for output in (got, want))
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)


def test_equal_largest_logits() -> None:
    hidden, weight, labels = make_inputs(9, 12, 4, torch.float64)
    with torch.no_grad():
        weight[5] = weight[2] = weight[11]
        hidden.copy_(weight[2] * torch.linspace(0.5, 4.0, 9, dtype=torch.float64).unsqueeze(1))
    labels[:3] = torch.tensor([2, 5, 11])
    got, want = linear_logprob(hidden, weight, labels), reference_logprob(hidden, weight, labels)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(gradients(output, (hidden, weight), *upstream_for(9)) for output in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_non_finite_hidden_states_are_seen() -> None:
    hidden, weight, labels = make_inputs(6, 9, 4, torch.float32)
    labels[:] = 1
    with torch.no_grad():
        hidden[2, 1] = float("inf")
    got = linear_logprob(hidden, weight, labels)
    assert bool(got.logprobs[2].isnan())
    assert bool(got.logprobs[[0, 1, 3, 4, 5]].isfinite().all())


def test_gradients_only_where_they_are_wanted() -> None:
    hidden, weight, labels = make_inputs(10, 12, 4, torch.float32)
    upstream = upstream_for(10)
    both = gradients(linear_logprob(hidden, weight, labels), (hidden, weight), *upstream)
    only_hidden = gradients(linear_logprob(hidden, weight.detach(), labels), (hidden,), *upstream)
    only_weight = gradients(linear_logprob(hidden.detach(), weight, labels), (weight,), *upstream)
    assert torch.equal(only_hidden[0], both[0])
    assert torch.equal(only_weight[0], both[1])
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, labels).logprobs.requires_grad


def test_entropy_alone_and_no_entropy() -> None:
    hidden, weight, labels = make_inputs(10, 12, 4, torch.float64)
    got, want = linear_logprob(hidden, weight, labels), reference_logprob(hidden, weight, labels)
    assert got.entropy is not None
    assert want.entropy is not None
    for ours, theirs in zip(
        torch.autograd.grad(got.entropy.sum(), (hidden, weight)),
        torch.autograd.grad(want.entropy.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    without = linear_logprob(hidden, weight, labels, with_entropy=False)
    assert without.entropy is None
    assert torch.equal(without.logprobs, got.logprobs)
    assert not got.logsumexp.requires_grad


def test_tokens_with_zero_upstream_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from klear_kernels import softmax_rows

    hidden, weight, labels = make_inputs(30, 12, 4, torch.float32)
    labels[:] = 3
    upstream = torch.zeros(30)
    upstream[[4, 21]] = 1.0
    output = linear_logprob(hidden, weight, labels)
    seen: list[int] = []
    original = softmax_rows.logits_into

    def counting(out: torch.Tensor, rows: torch.Tensor, problem: object) -> torch.Tensor:
        seen.append(rows.shape[0])
        return original(out, rows, problem)

    monkeypatch.setattr(softmax_rows, "logits_into", counting)
    grad_hidden, _ = gradients(output, (hidden, weight), upstream)
    assert sum(seen) == 2
    assert grad_hidden.abs().sum(1).nonzero().squeeze(1).tolist() == [4, 21]


def test_two_calls_add_up_in_one_weight_gradient() -> None:
    hidden, weight, labels = make_inputs(10, 12, 4, torch.float64)
    once = gradients(linear_logprob(hidden, weight, labels), (weight,), torch.ones(10))[0]
    for _ in range(2):
        linear_logprob(hidden, weight, labels).logprobs.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, labels = make_inputs(16, 20, 8, torch.float32)
    want = linear_logprob(hidden, weight, labels)
    want_gradients = gradients(want, (hidden, weight), *upstream_for(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(hidden, weight, labels)
        got_gradients = gradients(got, (hidden, weight), *upstream_for(16))
    assert torch.equal(got.logprobs, want.logprobs)
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        assert torch.equal(ours, theirs)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_more_than_a_chunk_of_logits(dtype: torch.dtype) -> None:
    tokens, words, chunk = 200, 400, 16
    hidden, weight, labels = make_inputs(tokens, words, 4, dtype)
    labels[:] = 0
    with _LargestTensor() as largest:
        gradients(linear_logprob(hidden, weight, labels, chunk_tokens=chunk), (hidden, weight), *upstream_for(tokens))
    assert chunk * words <= largest.elements < 2 * chunk * words
