"""All objectives over all regions, bounds, signs and betas, against a case table in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.algorithm import (
    PolicyObjective,
    cispo_gradient_scale,
    cispo_token_loss,
    clip_gradient_scale,
    clip_token_loss,
    gppo_gradient_scale,
    gppo_token_loss,
    policy_token_loss,
    policy_value_and_scale,
)
from megatron_klear.algorithm.clip import clip_ratio, clip_scale_at_ratio
from megatron_klear.algorithm.gppo import gppo_scale_at_ratio

KINDS = ("gppo", "clip", "cispo")


def expected_scale(kind: str, ratio: float, advantage: float, o: PolicyObjective) -> float:
    low, high = 1.0 - o.epsilon_low, 1.0 + o.epsilon_high
    if kind == "cispo":
        return min(max(ratio, low), high)
    below, above = ratio < low and advantage < 0, ratio > high and advantage > 0
    if kind == "clip":
        return 0.0 if below or above else ratio
    return o.beta_low * low if below else o.beta_high * high if above else ratio


def expected_value(kind: str, ratio: float, advantage: float, logprob: float, o: PolicyObjective) -> float:
    low, high = 1.0 - o.epsilon_low, 1.0 + o.epsilon_high
    if kind == "cispo":
        return -min(max(ratio, low), high) * advantage * max(logprob, -1e4)
    if kind == "clip":
        return -min(ratio * advantage, min(max(ratio, low), high) * advantage)
    return -advantage * expected_scale(kind, ratio, advantage, o)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    log_ratio=st.floats(-250, 250) | st.floats(-1, 1),
    old=st.floats(-300, 0),
    advantage=st.sampled_from([0.0]) | st.floats(-5, -1e-3) | st.floats(1e-3, 5),
    epsilons=st.tuples(st.floats(0, 1), st.floats(0, 3)),
    betas=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
)
def test_value_scale_and_gradient(
    kind: str,
    log_ratio: float,
    old: float,
    advantage: float,
    epsilons: tuple[float, float],
    betas: tuple[float, float],
) -> None:
    try:
        objective = PolicyObjective(kind, *epsilons, *betas)  # type: ignore[arg-type]
    except ValueError:
        assert 1 - epsilons[0] < 3e-9  # the only refusal here: a lower bound below the clamped ratio
        return
    new = old + log_ratio
    leaf = torch.tensor([new], dtype=torch.float64, requires_grad=True)
    arguments = (torch.tensor([old], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64))
    value, scale = policy_value_and_scale(leaf, *arguments, objective)
    loss = policy_token_loss(leaf, *arguments, objective)
    loss.sum().backward()
    ratio = math.exp(min(max(new - old, -20.0), 20.0))
    assert scale.item() == pytest.approx(expected_scale(kind, ratio, advantage, objective), rel=1e-12)
    assert value.item() == pytest.approx(expected_value(kind, ratio, advantage, new, objective), rel=1e-12)
    assert loss.item() == value.item()
    assert leaf.grad is not None
    assert leaf.grad.item() == -advantage * scale.item()
    assert not value.requires_grad
    assert not scale.requires_grad
    if kind == "gppo" and advantage != 0:
        assert leaf.grad.item() * advantage < 0, "GPPO drops no token: its gradient follows the advantage"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [-1.5, -1e-20, 0.0, 1e-20, 1.5])
@pytest.mark.parametrize("bound", ["low", "high"])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_at_a_bound_and_one_rounding_beside_it(dtype: torch.dtype, advantage: float, bound: str, side: int) -> None:
    epsilon_low, epsilon_high, beta_low, beta_high = 0.2, 0.28, 0.5, 2.0
    edge = torch.tensor([1 - epsilon_low if bound == "low" else 1 + epsilon_high], dtype=dtype)
    ratio = edge if side == 0 else torch.nextafter(edge, edge + side)
    advantages = torch.tensor([advantage], dtype=dtype)
    gppo = gppo_scale_at_ratio(
        ratio,
        advantages,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta_low=beta_low,
        beta_high=beta_high,
    )
    clip = clip_scale_at_ratio(ratio, advantages, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    # Strict inequalities (Eqs. 10, 12, 18): on the bound itself the coefficient is the ratio.
    beyond = (bound == "low" and side < 0 and advantage < 0) or (bound == "high" and side > 0 and advantage > 0)
    if beyond:
        beta = beta_low if bound == "low" else beta_high
        assert gppo.item() == pytest.approx(beta * edge.item(), rel=1e-6)
        assert clip.item() == 0.0
    else:
        assert gppo.item() == ratio.item()
        assert clip.item() == ratio.item()
    inside = (bound == "low") == (side > 0) and side != 0
    clipped = clip_ratio(ratio, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    assert clipped.item() == (ratio if inside else edge).item()


def test_bounds_reached_from_logprobs_exactly() -> None:
    # log-ratios whose exp is a power of two exactly: ratio 0.5 on the bound 1 - 0.5, ratio 2 on 1 + 1.
    log2 = math.log(2.0)
    new = torch.tensor([-log2, 0.0], dtype=torch.float64)
    old = torch.tensor([0.0, -log2], dtype=torch.float64)
    objective = PolicyObjective("gppo", epsilon_low=0.5, epsilon_high=1.0, beta_low=9.0, beta_high=9.0)
    _, scale = policy_value_and_scale(new, old, torch.tensor([-1.0, 1.0], dtype=torch.float64), objective)
    assert scale.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_functions_and_the_dispatch_agree(kind: str) -> None:
    rng = torch.Generator().manual_seed(2)
    new, old, advantages = (torch.randn(200, generator=rng) for _ in range(3))
    keywords = {"epsilon_low": 0.15, "epsilon_high": 0.4}
    if kind == "gppo":
        keywords |= {"beta_low": 0.3, "beta_high": 1.4}
    losses = {"gppo": gppo_token_loss, "clip": clip_token_loss, "cispo": cispo_token_loss}
    scales = {"gppo": gppo_gradient_scale, "clip": clip_gradient_scale, "cispo": cispo_gradient_scale}
    value, scale = policy_value_and_scale(new, old, advantages, PolicyObjective(kind, **keywords))  # type: ignore[arg-type]
    leaf = new.clone().requires_grad_(True)
    loss = losses[kind](leaf, old, advantages, **keywords)
    loss.sum().backward()
    assert torch.equal(loss, value)
    assert torch.equal(scales[kind](new, old, advantages, **keywords), scale)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, -advantages * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("new", "old"), [(-200.0, 0.0), (0.0, -200.0), (-math.inf, -1.0), (-1.0, -math.inf), (-math.inf, -math.inf)]
)
def test_extreme_log_ratios_are_finite_in_float32(kind: str, sign: float, new: float, old: float) -> None:
    leaf = torch.tensor([new], requires_grad=True)
    loss = policy_token_loss(leaf, torch.tensor([old]), torch.tensor([sign]), PolicyObjective(kind))  # type: ignore[arg-type]
    loss.sum().backward()
    assert leaf.grad is not None
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()
    if kind == "gppo":
        assert leaf.grad.item() * sign < 0


@pytest.mark.parametrize("kind", KINDS)
def test_zero_advantage_gives_exact_zeros_even_at_the_extremes(kind: str) -> None:
    leaf = torch.tensor([-300.0, 0.0, -1.0], requires_grad=True)
    old = torch.tensor([0.0, -300.0, -1.0])
    loss = policy_token_loss(leaf, old, torch.zeros(3), PolicyObjective(kind))  # type: ignore[arg-type]
    loss.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(loss.detach(), torch.zeros(3))
    assert torch.equal(leaf.grad, torch.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_all_objectives_share_the_policy_gradient(kind: str) -> None:
    leaf = torch.tensor([-0.5, -3.0, -9.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    policy_token_loss(leaf, leaf.detach(), advantages, PolicyObjective(kind)).sum().backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, -advantages)


def test_nan_logprob_stays_visible() -> None:
    loss = policy_token_loss(torch.tensor([math.nan]), torch.tensor([0.0]), torch.tensor([1.0]), PolicyObjective())
    assert loss.isnan().all()


def test_shapes_broadcast_only_to_the_shape_of_the_logprobs() -> None:
    new, per_response = torch.zeros(3, 5), torch.tensor([[1.0], [-1.0], [0.0]])
    loss = gppo_token_loss(new, torch.zeros(3, 5), per_response)
    assert torch.equal(loss, (-per_response).expand(3, 5))
    with pytest.raises(ValueError, match="broadcast"):
        gppo_token_loss(torch.zeros(5), torch.zeros(5), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="broadcast"):
        clip_token_loss(torch.zeros(5), torch.zeros(4), torch.zeros(5))
    with pytest.raises(ValueError, match="broadcast"):
        cispo_gradient_scale(torch.zeros(1), torch.zeros(1), torch.zeros(5))


def test_empty() -> None:
    leaf = torch.zeros(0, requires_grad=True)
    loss = policy_token_loss(leaf, torch.zeros(0), torch.zeros(0), PolicyObjective())
    loss.sum().backward()
    assert loss.shape == (0,)
    assert leaf.grad is not None
    assert leaf.grad.shape == (0,)


def test_objective_refuses_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match="kind is 'ppo'") as caught:
        PolicyObjective("ppo", epsilon_low=1.2, epsilon_high=-0.1, beta_low=-1.0, beta_high=math.nan)  # type: ignore[arg-type]
    for name in ("kind", "epsilon_low", "epsilon_high", "beta_low", "beta_high"):
        assert name in str(caught.value)
    for limit in (0.1, 81.0, math.nan):
        with pytest.raises(ValueError, match="log_ratio_limit"):
            PolicyObjective(log_ratio_limit=limit)


def test_objective_without_a_lower_bound() -> None:
    objective = PolicyObjective("cispo", epsilon_low=1.0, epsilon_high=4.0)
    _, scale = policy_value_and_scale(torch.tensor([-5.0]), torch.tensor([0.0]), torch.tensor([1.0]), objective)
    assert scale.item() == pytest.approx(math.exp(-5.0), rel=1e-6)
