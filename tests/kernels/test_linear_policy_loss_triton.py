"""linear_policy_loss's Triton backend against float64 of the same bfloat16 inputs, as near as rounding allows."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch

from klear_kernels import PolicyLossOutput, linear_policy_loss
from klear_kernels.linear_policy_loss.reference import reference_policy_loss
from megatron_klear.algorithm import PolicyObjective

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
    device: torch.device, tokens: int = 48, words: int = 83, size: int = 24, seed: int = 0, scale: float = 3.0
) -> Inputs:
    """Ratios on both sides of the clip range, both signs of advantage, ignored, lm-only, policy-only, idle tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, size).bfloat16(), (normal(words, size) * scale / math.sqrt(size)).bfloat16()
    labels = torch.randint(0, words, (tokens,), generator=generator)
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, labels.unsqueeze(1)).squeeze(1)
    draw = torch.rand(tokens, generator=generator)
    labels[draw < 0.2] = IGNORED
    weights = torch.rand(2, tokens, generator=generator) / tokens
    weights[0, (draw > 0.2) & (draw < 0.4)] = 0.0
    weights[1, draw > 0.6] = 0.0
    weights[:, draw > 0.95] = 0.0
    columns = [(exact + 0.5 * normal(tokens)).float(), normal(tokens).float(), weights[0], weights[1]]
    return Inputs(
        hidden.to(device).requires_grad_(),
        weight.to(device).requires_grad_(),
        labels.to(device),
        *(column.to(device) for column in columns),
    )


def run(inputs: Inputs, **settings: Any) -> PolicyLossOutput:
    return linear_policy_loss(*inputs, backend="triton", **{"objective": GPPO, **settings})


def gradients(output: PolicyLossOutput, inputs: Inputs, upstream: float = 1.0) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output.loss * upstream, (inputs.hidden, inputs.weight), retain_graph=True)


def reference(inputs: Inputs, **settings: Any) -> tuple[PolicyLossOutput, tuple[torch.Tensor, ...]]:
    """Float64 values of the inputs as they are rounded, and float64 gradients of the loss."""
    exact = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(), weight=inputs.weight.detach().double().requires_grad_()
    )
    output = reference_policy_loss(*exact, **{"objective": GPPO, **settings})
    return output, torch.autograd.grad(output.loss, exact[:2])


def rounded_gradients(inputs: Inputs, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What bfloat16 allows at best: exact gradients of exact logits rounded, multiplied exactly, results rounded."""
    x, w = inputs.hidden.detach().double(), inputs.weight.detach().double()
    logits = (x @ w.t()).requires_grad_()
    identity = torch.eye(w.shape[0], dtype=torch.float64, device=w.device)
    loss = reference_policy_loss(logits, identity, *inputs[2:], objective=GPPO, temperature=temperature).loss
    gradient = torch.autograd.grad(loss, logits)[0].bfloat16().double()
    return (gradient @ w).bfloat16(), (gradient.t() @ x).bfloat16()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def worst_row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of any row that has a gradient at all."""
    got, want = got.detach().double(), want.detach().double()
    norms = want.norm(dim=1)
    return float(((got - want).norm(dim=1)[norms > 0] / norms[norms > 0]).max())


def assert_same_values(got: PolicyLossOutput, want: PolicyLossOutput) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("tokens", "words", "size"), [(48, 83, 24), (64, 128, 16), (17, 33, 20), (9, 300, 40), (100, 31, 8)]
)
def test_values_and_gradients(
    triton_device: torch.device, tokens: int, words: int, size: int, temperature: float
) -> None:
    inputs = make_inputs(triton_device, tokens, words, size)
    got = run(inputs, temperature=temperature)
    want, exact_gradients = reference(inputs, temperature=temperature)
    assert_same_values(got, want)
    base = rounded_gradients(inputs, temperature)
    for mine, rounded, exact in zip(gradients(got, inputs), base, exact_gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        assert relative_error(mine, exact) <= 1.5 * relative_error(rounded, exact)


@pytest.mark.parametrize(
    "objective",
    [
        PolicyObjective(kind="gppo", beta_low=0.5, beta_high=1.7),
        PolicyObjective(kind="clip"),
        PolicyObjective(kind="clip", epsilon_low=0.2, epsilon_high=0.2),
        PolicyObjective(kind="cispo"),
    ],
)
def test_every_objective(triton_device: torch.device, objective: PolicyObjective) -> None:
    inputs = make_inputs(triton_device, tokens=60)
    got = run(inputs, objective=objective)
    want, exact_gradients = reference(inputs, objective=objective)
    assert_same_values(got, want)
    for mine, exact in zip(gradients(got, inputs, 2.5), exact_gradients, strict=True):
        # exponentials, scaled hidden states, result, result times upstream: each rounded once
        assert relative_error(mine, 2.5 * exact) <= 4 * 2.0**-9


def test_what_lies_behind_the_valid_rows_is_never_read(triton_device: torch.device) -> None:
    inputs = make_inputs(triton_device, words=70)
    inputs = inputs._replace(labels=torch.where(inputs.labels >= 53, 52, inputs.labels))
    want, want_gradients = reference(inputs, vocab_size=53)
    ignored = inputs.labels == IGNORED
    with torch.no_grad():
        inputs.weight[53:] = float("nan")
        inputs.hidden[ignored] = float("nan")
        for column in inputs[3:]:
            column[ignored] = float("nan")
    got = run(inputs, vocab_size=53, chunk_tokens=13)
    assert_same_values(got, want)
    grad_hidden, grad_weight = gradients(got, inputs)
    assert not grad_weight[53:].any()
    assert not grad_hidden[ignored].any()
    for mine, exact in zip((grad_hidden, grad_weight), want_gradients, strict=True):
        assert relative_error(mine, exact) <= 3 * 2.0**-9


def test_results_do_not_depend_on_the_chunk_size_and_reruns_are_equal(triton_device: torch.device) -> None:
    inputs = make_inputs(triton_device, tokens=40, words=70, size=16)
    want = run(inputs, chunk_tokens=40)
    for chunk_tokens in (3, 7, 29, None):
        got, again = (run(inputs, chunk_tokens=chunk_tokens) for _ in range(2))
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-7)
        assert torch.equal(got.loss, again.loss)
        mine = zip(gradients(got, inputs), gradients(want, inputs), gradients(again, inputs), strict=True)
        for ours, first, second in mine:
            assert torch.equal(ours, second)
            assert relative_error(ours, first) <= 2 * 2.0**-9


def test_confident_tokens_keep_their_relative_precision(triton_device: torch.device) -> None:
    # One word wins by 8 to 24 nats: 1 - p_y from 1e-2 to 1e-9, and the whole gradient of a row is that small.
    size, words, tokens = 16, 40, 17
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(words, size, generator=generator) * 0.1
    weight[:, 0] = 0.0
    weight[17, 0] = 1.0
    hidden = torch.randn(tokens, size, generator=generator)
    hidden[:, 0] = torch.arange(8.0, 25.0)
    columns = [-torch.rand(tokens, generator=generator) / 10, *torch.rand(3, tokens, generator=generator)]
    inputs = Inputs(
        hidden.bfloat16().to(triton_device).requires_grad_(),
        weight.bfloat16().to(triton_device).requires_grad_(),
        torch.full((tokens,), 17, device=triton_device),
        *(column.to(triton_device) for column in columns),
    )
    got = run(inputs)
    want, theirs = reference(inputs)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=3e-5, atol=0.0)
    ours = gradients(got, inputs)
    base = rounded_gradients(inputs)
    assert worst_row_error(ours[0], theirs[0]) <= 1.5 * worst_row_error(base[0], theirs[0])
    assert worst_row_error(ours[0], theirs[0]) <= 3 * 2.0**-9  # not by both being bad
    # One row outweighs the rest, so nothing averages out: exponentials, scaled hidden states and result.
    assert relative_error(ours[1], theirs[1]) <= 3 * 2.0**-9


def test_wrong_old_logprobs_are_found_out_and_the_rows_done_again(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = importlib.import_module("klear_kernels.linear_policy_loss.triton_backend")
    redone: list[int] = []
    original = backend._measured_pass

    def counting(problem: Any, terms: Any, gradients: Any, outside: torch.Tensor, *rest: Any) -> None:
        redone.extend(problem.rows[outside].tolist())
        original(problem, terms, gradients, outside, *rest)

    monkeypatch.setattr(backend, "_measured_pass", counting)
    inputs = make_inputs(triton_device)
    inputs.labels[:] = 5
    inputs.policy_weight[:] = 0.01
    inputs.lm_weight[:] = 0.01
    with torch.no_grad():
        inputs.hidden[:, 0] = 1.0
        inputs.weight[:, 0] = 0.0
        inputs.weight[5, 0] = -160.0  # a label whose logit lies far below all others
        inputs.hidden[3:6, 0] = -1.0  # and three tokens for which it lies far above
    inputs.old_logprobs[:] = 0.0
    inputs.old_logprobs[0] = -math.inf
    inputs.old_logprobs[1] = -1e4
    inputs.old_logprobs[2] = math.nan
    inputs.policy_weight[2] = 0.0
    inputs.old_logprobs[4] = -200.0  # near certain now, impossible before: the ratio is clamped, the sum tiny
    got = run(inputs, chunk_tokens=11)
    assert redone == [0, 1, 2, *range(6, 48)]
    want, theirs = reference(inputs)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=1e-4)
    ours = gradients(got, inputs)
    for mine, exact in zip(ours, theirs, strict=True):
        assert bool(mine.isfinite().all())
        assert relative_error(mine, exact) <= 3 * 2.0**-9
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0.0)


def test_good_references_need_no_second_pass(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("klear_kernels.linear_policy_loss.triton_backend")
    seen: list[float] = []
    original = backend._exponentiate

    def watching(*arguments: Any) -> Any:
        rows = original(*arguments)
        seen.extend(rows.log_sum.abs().tolist())
        return rows

    def forbidden(*_: Any) -> None:
        raise AssertionError("rows were computed again")

    monkeypatch.setattr(backend, "_exponentiate", watching)
    monkeypatch.setattr(backend, "_measured_pass", forbidden)
    inputs = make_inputs(triton_device, scale=2.0)
    inputs.lm_weight[:] = 0.0
    run(inputs)
    # The reference is the log-sum-exp under the old policy: off by the log-ratio, here within three of 0.5.
    assert max(seen) < 2.0


@pytest.mark.parametrize("offset", [-1e4, -100.0, 100.0, 1e4])
def test_far_from_zero_logits(triton_device: torch.device, offset: float) -> None:
    inputs = make_inputs(triton_device, tokens=18, words=40)
    with torch.no_grad():
        inputs.hidden[:, 0] = 1.0
        inputs.weight[:, 0] = offset
    got = run(inputs)
    want, theirs = reference(inputs)
    rounding = 8 * abs(offset) * 2.0**-23
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=1e-5, atol=rounding + 1e-5)
    for mine, exact in zip(gradients(got, inputs), theirs, strict=True):
        assert bool(mine.isfinite().all())
        assert relative_error(mine[:, 1:], exact[:, 1:]) < 2 * rounding + 3 * 2.0**-9


def test_idle_tokens_report_and_get_no_gradient(triton_device: torch.device) -> None:
    inputs = make_inputs(triton_device, tokens=40)
    trained = torch.zeros(40, dtype=torch.bool, device=triton_device)
    trained[[2, 30]] = True
    inputs.labels[:4] = 1
    inputs.labels[30] = 1
    inputs = inputs._replace(
        policy_weight=trained.double(), lm_weight=torch.zeros(40, device=triton_device, dtype=torch.float64)
    )
    got = run(inputs)
    assert_same_values(got, reference(inputs)[0])
    grad_hidden, _ = gradients(got, inputs)
    assert grad_hidden.abs().sum(1).nonzero().squeeze(1).tolist() == [2, 30]
    zero_advantage = inputs._replace(advantages=torch.zeros(40, device=triton_device))
    for gradient in gradients(run(zero_advantage), zero_advantage):
        assert not gradient.any()


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_compute_gives_exact_zeros(triton_device: torch.device, tokens: int) -> None:
    inputs = make_inputs(triton_device, tokens=6, words=40)
    inputs = Inputs(*(column[:tokens] if column is not inputs.weight else column for column in inputs))
    inputs = inputs._replace(labels=torch.full((tokens,), IGNORED, device=triton_device))
    got = run(inputs)
    assert float(got.loss.detach()) == 0.0
    for gradient in gradients(got, inputs):
        assert not gradient.any()


def test_without_gradients_and_without_entropy(triton_device: torch.device) -> None:
    inputs = make_inputs(triton_device)
    want = run(inputs)
    with torch.no_grad():
        got = run(inputs)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, want.loss.detach(), rtol=1e-6, atol=1e-7)
    without = run(inputs, with_entropy=False)
    assert without.entropy is None
    for ours, theirs in zip(gradients(without, inputs), gradients(want, inputs), strict=True):
        assert torch.equal(ours, theirs)
    only_hidden = run(inputs._replace(weight=inputs.weight.detach()))
    assert torch.equal(torch.autograd.grad(only_hidden.loss, inputs.hidden)[0], gradients(want, inputs)[0])
    only_weight = run(inputs._replace(hidden=inputs.hidden.detach()))
    assert torch.equal(torch.autograd.grad(only_weight.loss, inputs.weight)[0], gradients(want, inputs)[1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_hidden_states_are_seen(triton_device: torch.device, value: float) -> None:
    inputs = make_inputs(triton_device, tokens=6, words=40)
    inputs.labels[:] = 1
    inputs.policy_weight[:] = 0.1
    with torch.no_grad():
        inputs.hidden[2, 1] = value
    got = run(inputs)
    assert bool(got.loss.isnan())
    assert bool(got.logprobs[2].isnan())
    assert bool(got.logprobs[[0, 1, 3, 4, 5]].isfinite().all())
    grad_hidden, grad_weight = gradients(got, inputs)
    assert bool(grad_hidden[2].isnan().all())
    assert bool(grad_hidden[[0, 1, 3, 4, 5]].isfinite().all())
    assert bool(grad_weight.isnan().any())


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0])
def test_weight_gradient_into_main_grad(triton_device: torch.device, upstream: float) -> None:
    inputs = make_inputs(triton_device)
    want = reference(inputs)[1]
    size = float(want[1].norm())
    inputs.weight.main_grad = torch.full(inputs.weight.shape, 0.5 * size, device=triton_device)
    for _ in range(2):
        (run(inputs, into_main_grad=True, chunk_tokens=16).loss * upstream).backward()
    assert inputs.weight.grad is None
    assert relative_error(inputs.hidden.grad, 2 * upstream * want[0]) <= 4 * 2.0**-9 or upstream == 0.0
    got = inputs.weight.main_grad.double() - 0.5 * size
    # Nothing of the result is rounded to bfloat16: exponentials and scaled hidden states are. Where the upstream is not
    # 1 the difference to it is made up for from other roundings, of up to the whole gradient.
    allowed = 1.5 * 2.0**-9 * (2.0 * size) * (1.0 if upstream == 1.0 else 2.0)
    assert float((got - 2 * upstream * want[1]).norm()) <= allowed


def test_autocast_and_checkpointing_change_nothing(triton_device: torch.device) -> None:
    inputs = make_inputs(triton_device)
    want = gradients(run(inputs), inputs)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        for ours, theirs in zip(gradients(run(inputs), inputs), want, strict=True):
            assert torch.equal(ours, theirs)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return run(inputs._replace(hidden=hidden)).loss

    loss = torch.utils.checkpoint.checkpoint(head, inputs.hidden * 1.0, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(loss, (inputs.hidden, inputs.weight)), want, strict=True):
        assert torch.equal(ours, theirs)
