"""Conformance: each equation of the paper against an independent transcription, in float64, as a list of checks.

`python -m megatron_klear.verify` prints these as a table on the user's own machine; the tests run them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_klear.algorithm import transcriptions as printed
from megatron_klear.algorithm.advantages import group_advantages
from megatron_klear.algorithm.filter import zero_advantage_mask
from megatron_klear.algorithm.generalized_advantages import generalized_advantages
from megatron_klear.algorithm.joint import joint_objective
from megatron_klear.algorithm.language_model import lm_token_loss
from megatron_klear.algorithm.objective import PolicyObjective, policy_token_loss, policy_value_and_scale
from megatron_klear.algorithm.token_weights import (
    PolicyNormalizer,
    Weights,
    lm_token_weights,
    policy_token_weights,
    sft_token_weights,
)
from megatron_klear.algorithm.transcriptions import ToyBatch, toy_batch

FLOAT64_TOLERANCE = 1e-13
"""A few hundred roundings of numbers around 1; the errors seen are near 1e-16."""

EPSILONS = (0.2, 0.28)
BETAS = (0.6, 1.7)


@dataclass(frozen=True, slots=True)
class EquationCheck:
    """One comparison of this room with the paper.

    Attributes:
        name: what is compared, for people.
        equation: where it stands in the paper.
        measure: returns the largest error, absolute, on a device.
        tolerance: the check passes where the error is at most this.
    """

    name: str
    equation: str
    measure: Callable[[torch.device], float]
    tolerance: float = FLOAT64_TOLERANCE

    def passes(self, max_error: float) -> bool:
        """Say whether an error is within tolerance; NaN is not."""
        return max_error <= self.tolerance


def _max_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, NaN if there is one."""
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


def _spread(batch: ToyBatch, weights: list[Weights]) -> Tensor:
    return batch.per_token([group.tolist() for group in weights])


def _advantages(batch: ToyBatch) -> Tensor:
    """Return our advantages of the toy batch, one per token, flat."""
    per_group = group_advantages(torch.tensor(batch.rewards, dtype=torch.float64))
    return batch.per_token([list(map(float, group)) for group in per_group])


def _loss_and_gradient(loss: Tensor, batch: ToyBatch) -> Tensor:
    leaves = [response for group in batch.logprobs for response in group]
    return torch.cat([loss.reshape(1), *torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)])


def _compare(batch: ToyBatch, ours: Tensor, theirs: Tensor) -> float:
    """Return the largest error of two losses and of their gradients in every logprob."""
    return _max_error(_loss_and_gradient(ours, batch), _loss_and_gradient(theirs, batch))


def _policy_loss(batch: ToyBatch, objective: PolicyObjective, normalizer: PolicyNormalizer) -> Tensor:
    """Return our loss the way the trainer forms it: a plain sum of weight times token loss."""
    weights = _spread(batch, policy_token_weights(batch.counts(), normalizer))
    new, old = batch.flat(batch.logprobs), batch.flat(batch.old_logprobs)
    return (weights * policy_token_loss(new, old, _advantages(batch), objective)).sum()


def _eq1(device: torch.device) -> float:
    batch = toy_batch(device)
    objective = PolicyObjective("clip", epsilon_low=0.2, epsilon_high=0.2)
    term = printed.clip_term(0.2, 0.2)
    new, old = batch.flat(batch.logprobs), batch.flat(batch.old_logprobs)
    advantages = _advantages(batch)
    terms = [term(torch.exp(new[t]) / torch.exp(old[t]), float(advantages[t])) for t in range(len(new))]
    return _compare(batch, _policy_loss(batch, objective, "batch"), -torch.stack(terms).mean())


def _eq2(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    values = torch.randn(10, generator=generator, dtype=torch.float64)
    worst = 0.0
    for gamma, lam in ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (1.0, 0.7)):
        ours = generalized_advantages(rewards.to(device), values.to(device), gamma=gamma, lam=lam)
        theirs = printed.generalized_advantages_eq2(rewards.tolist(), values.tolist(), gamma, lam)
        worst = max(worst, _max_error(ours.cpu(), torch.tensor(theirs, dtype=torch.float64)))
    return worst


def _eq4(device: torch.device) -> float:
    rewards = [[1.0, -1.0, -1.0, 1.0], [0.1] * 4, [0.25, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    ours = group_advantages(torch.tensor(rewards, dtype=torch.float64, device=device))
    theirs = torch.tensor([printed.advantages_eq4(group) for group in rewards], dtype=torch.float64)
    return _max_error(ours.cpu(), theirs)


def _eq4_ungraded(device: torch.device) -> float:
    rewards = torch.tensor([[1.0, math.nan, 0.0, 0.25], [1.0, -1.0, -1.0, -1.0]], dtype=torch.float64, device=device)
    graded = torch.tensor([[True, False, True, True], [False, True, True, True]], device=device)
    left = printed.advantages_eq4([1.0, 0.0, 0.25])
    theirs = torch.tensor([[left[0], 0.0, left[1], left[2]], [0.0] * 4], dtype=torch.float64)
    return _max_error(group_advantages(rewards, graded).cpu(), theirs)


def _clip(epsilons: tuple[float, float], normalizer: PolicyNormalizer) -> Callable[[torch.device], float]:
    """Eqs. 3 and 6 (sequence) and 7 (group)."""

    def measure(device: torch.device) -> float:
        batch = toy_batch(device)
        frame = printed.sequence_mean_objective if normalizer == "sequence" else printed.token_mean_objective
        ours = _policy_loss(batch, PolicyObjective("clip", *epsilons), normalizer)
        return _compare(batch, ours, -frame(batch, printed.clip_term(*epsilons)))

    return measure


def _gppo(betas: tuple[float, float]) -> Callable[[torch.device], float]:
    """Eq. 11 (betas 1, literal moving bounds) and Eq. 17 (its three cases)."""

    def measure(device: torch.device) -> float:
        batch = toy_batch(device)
        literal = printed.gppo_term(*EPSILONS) if betas == (1, 1) else printed.general_gppo_term(*EPSILONS, *betas)
        ours = _policy_loss(batch, PolicyObjective("gppo", *EPSILONS, *betas), "group")
        return _compare(batch, ours, -printed.token_mean_objective(batch, literal))

    return measure


def _eq15(device: torch.device) -> float:
    batch = toy_batch(device)
    ours = _policy_loss(batch, PolicyObjective("cispo", *EPSILONS), "group")
    return _compare(batch, ours, -printed.cispo_objective(batch, *EPSILONS))


def _case_grid(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ratios inside, outside and next to the bounds, times advantages of every sign; and their logprobs."""
    bounds = [1 - EPSILONS[0], 1 + EPSILONS[1]]
    around = [bound * (1 + step) for bound in bounds for step in (-1e-9, 1e-9, -0.3, 0.3)]
    grid = torch.cartesian_prod(
        torch.tensor([1e-6, 0.05, *around, 1.0, 4.0, 1e6], dtype=torch.float64),
        torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64),
    ).to(device)
    old = torch.full_like(grid[:, 0], -1.25)
    return grid[:, 0].log() + old, old, grid[:, 1]


def _coefficient(
    objective: PolicyObjective, literal: Callable[[float, float], float]
) -> Callable[[torch.device], float]:
    """Eqs. 10, 12, 16 and 18: the coefficient F of phi in the gradient, relative to F, from autograd and directly."""

    def measure(device: torch.device) -> float:
        new, old, advantages = _case_grid(device)
        leaf = new.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(policy_token_loss(leaf, old, advantages, objective).sum(), leaf)
        ratios = (new - old).exp().tolist()
        values = [literal(ratio, advantage) for ratio, advantage in zip(ratios, advantages.tolist(), strict=True)]
        expected = torch.tensor(values, dtype=torch.float64, device=device)
        _, scale = policy_value_and_scale(new, old, advantages, objective)
        size = expected.clamp(min=1e-300)
        signal = advantages != 0
        return max(
            _max_error((gradient + advantages * expected) / size, torch.zeros_like(expected)),
            _max_error(((scale - expected) / size)[signal], torch.zeros_like(expected[signal])),
        )

    return measure


def _eq9(device: torch.device) -> float:
    """Compare the gradient in the logits with phi written out: F A (1[b = a] - pi(b))."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 11, generator=generator, dtype=torch.float64).to(device).requires_grad_(True)
    labels = torch.randint(0, 11, (40,), generator=generator).to(device)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64).to(device)
    shift = 0.6 * torch.randn(40, generator=generator, dtype=torch.float64).to(device)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]
    old = logprobs.detach() - shift
    loss = policy_token_loss(logprobs, old, advantages, PolicyObjective("gppo", *EPSILONS))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = torch.empty_like(gradient)
    for t in range(40):
        exponentials = [math.exp(value) for value in logits[t].tolist()]
        factor = printed.scale_eq18(math.exp(float(shift[t])), float(advantages[t]), *EPSILONS)
        for b in range(11):
            phi = float(b == int(labels[t])) - exponentials[b] / sum(exponentials)
            expected[t, b] = -factor * float(advantages[t]) * phi
    return _max_error(gradient, expected)


def _eq8(device: torch.device) -> float:
    batch = toy_batch(device)
    counts = [count for group in batch.counts() for count in group]
    flat_weights = sft_token_weights(counts, "sequence")
    weights = _spread(batch, [flat_weights[4 * g : 4 * g + 4] for g in range(len(batch.logprobs))])
    ours = (weights * lm_token_loss(batch.flat(batch.logprobs))).sum()
    return _compare(batch, ours, printed.lm_loss_eq8(batch))


_PHI = [[True, False, True, False], [False, False, True, False], [False, False, False, False]]


def _eq13(device: torch.device) -> float:
    batch = toy_batch(device)
    weights = _spread(batch, lm_token_weights(batch.counts(), _PHI))
    ours = (weights * lm_token_loss(batch.flat(batch.logprobs))).sum()
    return _compare(batch, ours, printed.lm_loss_eq13(batch, _PHI))


def _eq14(device: torch.device) -> float:
    """Compare both of our forms, alpha as a factor and alpha folded into the weights, with the printed sum."""
    batch = toy_batch(device)
    theirs = -printed.token_mean_objective(batch, printed.gppo_term(*EPSILONS)) + 0.1 * printed.lm_loss_eq13(
        batch, _PHI
    )
    policy = _policy_loss(batch, PolicyObjective("gppo", *EPSILONS), "group")
    token_losses = lm_token_loss(batch.flat(batch.logprobs))
    factor = (_spread(batch, lm_token_weights(batch.counts(), _PHI)) * token_losses).sum()
    folded = (_spread(batch, lm_token_weights(batch.counts(), _PHI, lm_loss_weight=0.1)) * token_losses).sum()
    joined = joint_objective(policy, factor, 0.1)
    target = _loss_and_gradient(theirs, batch)
    forms = [_loss_and_gradient(form, batch) for form in (joined, policy + folded)]
    return max(_max_error(form, target) for form in forms)


def _filter(device: torch.device) -> float:
    """Count groups that the filter judges otherwise than a look at the rewards does."""
    rewards = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.1, 0.1, 0.1], [0.1, 0.1, 0.2]]
    for dtype in (torch.float32, torch.float64):
        advantages = group_advantages(torch.tensor(rewards, dtype=dtype, device=device))
        if zero_advantage_mask(advantages).tolist() != [len(set(group)) == 1 for group in rewards]:
            return 1.0
    return 0.0


def _extremes(device: torch.device) -> float:
    """Count losses and gradients that are not finite in float32, and GPPO tokens that lost their gradient."""
    infinity = math.inf
    pairs = [(-200.0, 0.0), (0.0, -200.0), (-infinity, -1.0), (-1.0, -infinity), (-infinity, -infinity)]
    bad = 0
    for objective in (PolicyObjective("gppo"), PolicyObjective("clip"), PolicyObjective("cispo")):
        for sign in (-1.0, 1.0):
            new = torch.tensor([pair[0] for pair in pairs], device=device, requires_grad=True)
            old = torch.tensor([pair[1] for pair in pairs], device=device)
            loss = policy_token_loss(new, old, torch.full_like(old, sign), objective)
            (gradient,) = torch.autograd.grad(loss.sum(), new)
            bad += int((~loss.isfinite()).sum()) + int((~gradient.isfinite()).sum())
            bad += int((gradient == 0).sum()) if objective.kind == "gppo" else 0
    return float(bad)


def equation_checks() -> tuple[EquationCheck, ...]:
    """Return the checks in the order of the paper's equations."""
    clip = PolicyObjective("clip", *EPSILONS)
    gppo, general = PolicyObjective("gppo", *EPSILONS), PolicyObjective("gppo", *EPSILONS, *BETAS)
    cispo = PolicyObjective("cispo", *EPSILONS)
    return (
        EquationCheck("PPO clip, loss and gradient", "Eq. 1", _eq1),
        EquationCheck("generalized advantages", "Eq. 2", _eq2),
        EquationCheck("GRPO, mean over sequences", "Eq. 3", _clip((0.2, 0.2), "sequence")),
        EquationCheck("group advantages", "Eq. 4", _eq4),
        EquationCheck("group advantages, ungraded responses left out", "Eq. 4", _eq4_ungraded),
        EquationCheck("clip-higher, mean over sequences", "Eqs. 5, 6", _clip(EPSILONS, "sequence")),
        EquationCheck("clip-higher, token level", "Eq. 7", _clip(EPSILONS, "group")),
        EquationCheck("SFT loss", "Eq. 8", _eq8),
        EquationCheck("gradient in the logits", "Eqs. 9, 12", _eq9),
        EquationCheck(
            "PPO clip, coefficient", "Eq. 10", _coefficient(clip, lambda r, a: printed.scale_eq10(r, a, *EPSILONS))
        ),
        EquationCheck("GPPO against the printed quotient", "Eq. 11", _gppo((1, 1))),
        EquationCheck(
            "GPPO, coefficient", "Eq. 12", _coefficient(gppo, lambda r, a: printed.scale_eq18(r, a, *EPSILONS))
        ),
        EquationCheck("LM loss on correct rollouts", "Eq. 13", _eq13),
        EquationCheck("joint objective", "Eq. 14", _eq14),
        EquationCheck("CISPO, loss and gradient", "Eq. 15", _eq15),
        EquationCheck(
            "CISPO, coefficient", "Eq. 16", _coefficient(cispo, lambda r, a: printed.scale_eq16(r, a, *EPSILONS))
        ),
        EquationCheck("general GPPO against the printed quotient", "Eq. 17", _gppo(BETAS)),
        EquationCheck(
            "general GPPO, coefficient",
            "Eq. 18",
            _coefficient(general, lambda r, a: printed.scale_eq18(r, a, *EPSILONS, BETAS)),
        ),
        EquationCheck("zero-advantage groups, misjudged", "Section 5.2.5", _filter, tolerance=0.0),
        EquationCheck(
            "float32 at log-ratios of 200 and infinity, bad numbers", "Eqs. 11, 15", _extremes, tolerance=0.0
        ),
    )
