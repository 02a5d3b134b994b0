"""linear_policy_loss against full float64 logits and autograd, and coefficients worked out by hand."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch

from klear_kernels import PolicyLossOutput, linear_policy_loss
from klear_kernels.linear_logprob.reference import reference_logprob
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from megatron_klear.algorithm import PolicyObjective

BACKEND = importlib.import_module("klear_kernels.linear_policy_loss.torch_backend")
IGNORED = -100
GPPO = PolicyObjective(kind="gppo")


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    policy_weight: torch.Tensor
    lm_weight: torch.Tensor


def make_inputs(
    tokens: int = 48, words: int = 70, size: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    """Ratios on both sides of the clip range, both signs of advantage, ignored tokens, lm-only and policy-only ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, size).to(dtype), (normal(words, size) * 3 / math.sqrt(size)).to(dtype)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, labels.unsqueeze(1)).squeeze(1)
    draw = torch.rand(tokens, generator=generator)
    labels[draw < 0.2] = IGNORED
    weights = torch.rand(2, tokens, generator=generator) / tokens
    weights[0, (draw > 0.2) & (draw < 0.4)] = 0.0
    weights[1, draw > 0.6] = 0.0
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        (exact + 0.5 * normal(tokens)).float(),
        normal(tokens).float(),
        weights[0],
        weights[1],
    )


def gradients(output: PolicyLossOutput, inputs: Inputs, upstream: float = 1.0) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output.loss * upstream, (inputs.hidden, inputs.weight), retain_graph=True)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    "objective",
    [
        GPPO,
        PolicyObjective(kind="gppo", beta_low=0.5, beta_high=1.7),
        PolicyObjective(kind="clip"),
        PolicyObjective(kind="clip", epsilon_low=0.2, epsilon_high=0.2),
        PolicyObjective(kind="cispo"),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_equals_autograd_through_full_logits(objective: PolicyObjective, temperature: float) -> None:
    inputs = make_inputs()
    settings: dict[str, Any] = {"objective": objective, "temperature": temperature}
    got = linear_policy_loss(*inputs, **settings, chunk_tokens=9)
    want = reference_policy_loss(*inputs, **settings)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(got, inputs, 2.5), gradients(want, inputs, 2.5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def printed_loss(kind: str, logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The summands as the paper prints them (Eqs. 7, 11, 15), sign turned, for ratios that are not extreme."""
    ratio = torch.exp(logprobs - old)
    low, high = 0.8, 1.28
    if kind == "clip":
        return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if kind == "cispo":
        return -ratio.detach().clamp(low, high) * advantages * logprobs
    one = ratio / ratio.detach()
    kept = torch.where(ratio < low, low * one, torch.where(ratio > high, high * one, ratio))
    return -torch.minimum(ratio * advantages, kept * advantages)


@pytest.mark.parametrize("kind", ["gppo", "clip", "cispo"])
def test_equals_the_printed_equations_differentiated_by_torch(kind: Any) -> None:
    inputs = make_inputs(tokens=200)
    keep = inputs.labels != IGNORED
    old, advantages = inputs.old_logprobs.double(), inputs.advantages.double()
    logprobs = reference_logprob(*inputs[:3]).logprobs
    ratio = torch.exp(logprobs - old)[keep & (inputs.policy_weight > 0)].detach()
    assert int((ratio < 0.8).sum()) > 10
    assert int((ratio > 1.28).sum()) > 10
    printed = printed_loss(kind, logprobs, old, advantages)
    total = (inputs.policy_weight * printed - inputs.lm_weight * logprobs)[keep].sum()
    want = torch.autograd.grad(total, inputs[:2])
    got = linear_policy_loss(*inputs, objective=PolicyObjective(kind=kind))
    torch.testing.assert_close(got.loss, total, rtol=1e-10, atol=0.0)
    for ours, theirs in zip(gradients(got, inputs), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "coefficient"),
    [
        # Eq. 18 with epsilon_low 0.2, epsilon_high 0.28, beta_low 0.5, beta_high 2
        (math.log(0.5), -1.5, 0.5 * 0.8),  # far down, negative advantage: held at the lower bound
        (math.log(0.5), 1.5, 0.5),  # far down, positive advantage: the ratio
        (math.log(3.0), 2.0, 2.0 * 1.28),  # far up, positive advantage: held at the upper bound
        (math.log(3.0), -2.0, 3.0),  # far up, negative advantage: the ratio
        (0.0, 1.0, 1.0),
        (0.0, 0.0, 1.0),
    ],
)
def test_gradient_by_hand(log_ratio: float, advantage: float, coefficient: float) -> None:
    # Two words with logits h and 0, label 0: logp = -log1p(exp(-h)), d logp / dh = 1 - p.
    h, u, w = 0.3, 0.25, 0.125
    hidden = torch.tensor([[h]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    logp = -math.log1p(math.exp(-h))

    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    objective = PolicyObjective(kind="gppo", epsilon_low=0.2, epsilon_high=0.28, beta_low=0.5, beta_high=2.0)
    output = linear_policy_loss(
        hidden,
        weight,
        torch.tensor([0]),
        one(logp - log_ratio),
        one(advantage),
        one(u),
        one(w),
        objective=objective,
    )
    output.loss.backward()
    upstream = -u * advantage * coefficient - w
    rest = 1 - math.exp(logp)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.item() == pytest.approx(upstream * rest, rel=1e-12)
    assert weight.grad.squeeze(1).tolist() == pytest.approx([upstream * rest * h, -upstream * rest * h], rel=1e-12)
    assert output.lm_loss.item() == pytest.approx(-w * logp, rel=1e-12)


def test_gradcheck_where_the_loss_is_smooth() -> None:
    # Ratios near 1 (clip is the identity there), so that numerical differences see the same coefficient.
    inputs = make_inputs(tokens=6, words=7, size=3)
    with torch.no_grad():
        logprobs = reference_policy_loss(*inputs, objective=GPPO).logprobs
    inputs = inputs._replace(old_logprobs=logprobs + 0.05)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_policy_loss(hidden, weight, *inputs[2:], objective=GPPO, chunk_tokens=2).loss

    assert torch.autograd.gradcheck(loss, (inputs.hidden, inputs.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_a_fraction_of_the_plain_computation_in_bfloat16(dtype: torch.dtype) -> None:
    from megatron_klear.algorithm import policy_token_loss

    inputs = make_inputs(tokens=160, words=1200, size=64, dtype=dtype)
    want = reference_policy_loss(*inputs, objective=GPPO)
    got = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=48)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:2]]
    keep = inputs.labels != IGNORED
    logits = (low[0][keep] @ low[1].t()).float()
    logprobs = torch.log_softmax(logits, -1).gather(1, inputs.labels[keep].unsqueeze(1)).squeeze(1)
    policy = policy_token_loss(logprobs, inputs.old_logprobs[keep], inputs.advantages[keep], GPPO)
    plain = (inputs.policy_weight[keep] * policy - inputs.lm_weight[keep] * logprobs).sum()
    base = torch.autograd.grad(plain, low)
    assert got.loss.dtype == torch.float32
    assert abs(float(got.loss.detach()) - float(want.loss.detach())) < 1e-5 * float(want.loss.detach().abs())
    for mine, exact, low_precision in zip(gradients(got, inputs), gradients(want, inputs), base, strict=True):
        assert relative_error(mine, exact) <= 0.5 * relative_error(low_precision, exact)


def test_results_do_not_depend_on_the_chunk_size() -> None:
    inputs = make_inputs(dtype=torch.float32)
    want = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=48)
    for chunk_tokens in (1, 5, 47, None):
        got = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        for mine, first in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
            assert relative_error(mine, first) < 1e-5
        again = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=chunk_tokens)
        assert torch.equal(got.loss, again.loss)
        for mine, second in zip(gradients(got, inputs), gradients(again, inputs), strict=True):
            assert torch.equal(mine, second)


def test_upstream_scales_and_a_kept_graph_can_be_used_again() -> None:
    inputs = make_inputs(dtype=torch.float32)
    output = linear_policy_loss(*inputs, objective=GPPO)
    once, half, again = (gradients(output, inputs, upstream) for upstream in (1.0, 0.5, 1.0))
    for first, scaled, second in zip(once, half, again, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first * 0.5, scaled)
    # two microbatches into one weight gradient
    for _ in range(2):
        linear_policy_loss(*inputs, objective=GPPO).loss.backward()
    torch.testing.assert_close(inputs.weight.grad, 2 * once[1])


def test_what_untrained_tokens_hold_is_selected_away() -> None:
    inputs = make_inputs(dtype=torch.float32)
    no_policy = (inputs.policy_weight == 0) | (inputs.labels == IGNORED)
    assert bool((no_policy & (inputs.lm_weight > 0) & (inputs.labels != IGNORED)).any())
    clean = linear_policy_loss(*inputs, objective=GPPO)
    for poison in (float("nan"), float("inf"), float("-inf")):
        poisoned = inputs._replace(
            old_logprobs=torch.where(no_policy, poison, inputs.old_logprobs),
            advantages=torch.where(no_policy, poison, inputs.advantages),
        )
        got = linear_policy_loss(*poisoned, objective=GPPO)
        for ours, theirs in zip(got, clean, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(gradients(got, inputs), gradients(clean, inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_ignored_tokens_have_exact_zeros_even_with_poisoned_hidden_states_and_weights() -> None:
    inputs = make_inputs(dtype=torch.float32)
    ignored = inputs.labels == IGNORED
    with torch.no_grad():
        inputs.hidden[ignored] = float("nan")
    inputs = inputs._replace(
        policy_weight=torch.where(ignored, float("nan"), inputs.policy_weight),
        lm_weight=torch.where(ignored, float("inf"), inputs.lm_weight),
    )
    output = linear_policy_loss(*inputs, objective=GPPO, chunk_tokens=11)
    grad_hidden, grad_weight = gradients(output, inputs)
    assert bool(output.loss.isfinite())
    assert output.entropy is not None
    assert not output.logprobs[ignored].any()
    assert not output.entropy[ignored].any()
    assert not grad_hidden[ignored].any()
    assert bool(grad_hidden.isfinite().all())
    assert bool(grad_weight.isfinite().all())


@pytest.mark.parametrize("kind", ["gppo", "clip", "cispo"])
@pytest.mark.parametrize("log_ratio", [float("-inf"), -200.0, 200.0, float("inf")])
def test_extreme_log_ratios_stay_finite_in_float32(kind: Any, log_ratio: float) -> None:
    inputs = make_inputs(dtype=torch.float32)
    logprobs = linear_policy_loss(*inputs, objective=GPPO).logprobs
    inputs = inputs._replace(old_logprobs=logprobs - log_ratio)
    output = linear_policy_loss(*inputs, objective=PolicyObjective(kind=kind))
    assert bool(output.loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(output, inputs))


@pytest.mark.parametrize("tokens", [0, 7])
def test_nothing_to_train_gives_zero_loss_still_in_the_graph(tokens: int) -> None:
    inputs = make_inputs(tokens=tokens, dtype=torch.float32)
    inputs.labels.fill_(IGNORED)
    output = linear_policy_loss(*inputs, objective=GPPO)
    assert output.loss.item() == output.policy_loss.item() == output.lm_loss.item() == 0.0
    output.loss.backward()
    for tensor in (inputs.hidden, inputs.weight):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_tokens_without_loss_report_logprobs_and_cost_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(dtype=torch.float32)
    want = linear_policy_loss(*inputs, objective=GPPO)
    trained = torch.zeros(48, dtype=torch.bool)
    trained[[2, 30]] = True
    inputs.labels[[2, 30]] = 1
    inputs = inputs._replace(policy_weight=trained.double(), lm_weight=torch.zeros(48))
    formed: list[int] = []
    original = BACKEND.logprob_gradient_

    def counting(exponentials: torch.Tensor, *others: Any) -> torch.Tensor:
        formed.append(exponentials.shape[0])
        return original(exponentials, *others)

    monkeypatch.setattr(BACKEND, "logprob_gradient_", counting)
    got = linear_policy_loss(*inputs, objective=GPPO)
    grad_hidden, _ = gradients(got, inputs)
    assert sum(formed) == 2
    assert grad_hidden.abs().sum(1).nonzero().squeeze(1).tolist() == [2, 30]
    unchanged = ~trained
    torch.testing.assert_close(got.logprobs[unchanged], want.logprobs[unchanged], rtol=1e-6, atol=1e-6)
    assert bool((got.logprobs[inputs.labels != IGNORED] < 0).all())


def test_no_gradient_products_when_nothing_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(dtype=torch.float32)
    want = linear_policy_loss(*inputs, objective=GPPO)
    only_hidden = linear_policy_loss(inputs.hidden, inputs.weight.detach(), *inputs[2:], objective=GPPO)
    both = gradients(want, inputs)
    assert torch.equal(torch.autograd.grad(only_hidden.loss, inputs.hidden)[0], both[0])
    only_weight = linear_policy_loss(inputs.hidden.detach(), inputs.weight, *inputs[2:], objective=GPPO)
    assert torch.equal(torch.autograd.grad(only_weight.loss, inputs.weight)[0], both[1])

    def forbidden(*_: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(BACKEND, "logprob_gradient_", forbidden)
    with torch.no_grad():
        got = linear_policy_loss(*inputs, objective=GPPO)
    assert not got.loss.requires_grad
    assert torch.equal(got.loss, want.loss)
    detached = linear_policy_loss(inputs.hidden.detach(), inputs.weight.detach(), *inputs[2:], objective=GPPO)
    assert torch.equal(detached.loss, want.loss)


def test_only_the_loss_is_differentiable() -> None:
    output = linear_policy_loss(*make_inputs(dtype=torch.float32), objective=GPPO)
    assert output.loss.requires_grad
    assert output.entropy is not None
    assert not any(
        tensor.requires_grad for tensor in (output.policy_loss, output.lm_loss, output.logprobs, output.entropy)
    )


def test_padded_vocabulary_rows_are_never_read() -> None:
    inputs = make_inputs(dtype=torch.float32)
    words = 61
    labels = torch.where(inputs.labels >= words, words - 1, inputs.labels)
    inputs = inputs._replace(labels=labels)
    with torch.no_grad():
        inputs.weight[words:] = float("nan")
    got = linear_policy_loss(*inputs, objective=GPPO, vocab_size=words, chunk_tokens=10)
    want = reference_policy_loss(*inputs, objective=GPPO, vocab_size=words)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(got, inputs), gradients(want, inputs)
    assert relative_error(ours[0], theirs[0]) < 1e-5
    assert not ours[1][words:].any()
    assert relative_error(ours[1][:words], theirs[1][:words]) < 1e-5


def test_gradients_survive_activation_checkpointing() -> None:
    inputs = make_inputs(dtype=torch.float32)
    want = gradients(linear_policy_loss(*inputs, objective=GPPO), inputs)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return linear_policy_loss(hidden, inputs.weight, *inputs[2:], objective=GPPO).loss

    for use_reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(head, inputs.hidden * 1.0, use_reentrant=use_reentrant)
        inputs.hidden.grad = inputs.weight.grad = None
        loss.backward()
        assert torch.equal(inputs.hidden.grad, want[0])
        assert torch.equal(inputs.weight.grad, want[1])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"objective": "gppo"}, TypeError, r"objective: got str, allowed a PolicyObjective"),
        ({"objective": GPPO, "softcap": 50.0}, ValueError, r"softcap: got 50.0, allowed None"),
        ({"objective": GPPO, "backend": "best"}, ValueError, r"backend: got 'best', allowed on cpu"),
    ],
)
def test_settings_refused_by_name(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_policy_loss(*make_inputs(), **settings)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("old_logprobs", torch.zeros(3), ValueError, r"old_logprobs: got shape \(3,\), labels have \(48,\)"),
        ("advantages", torch.zeros(48, dtype=torch.int64), TypeError, r"advantages: got torch.int64"),
        ("policy_weight", torch.zeros(48, 1), ValueError, r"policy_weight: got shape \(48, 1\)"),
        ("lm_weight", torch.zeros(48, device="meta"), ValueError, r"lm_weight: got device meta"),
        ("advantages", None, TypeError, r"advantages: got NoneType, allowed a tensor"),
        ("labels", torch.full((48,), 70), ValueError, r"labels: got 70 at position 0, allowed 0 to 69"),
    ],
)
def test_refused_by_name(name: str, value: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_policy_loss(*make_inputs()._replace(**{name: value}), objective=GPPO)
