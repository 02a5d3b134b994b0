"""The paper's objectives as printed, token by token, for `equation_checks` to compare with.

Nothing here is used in training and nothing here calls the code under check: plain loops over prompts,
responses and tokens, the literal quotient by a stopped gradient, and derivatives by autograd. Slow, and finite
only where the ratio is moderate. All objectives are to be maximised, as printed; a loss is the negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TokenTerm = Callable[[Tensor, float], Tensor]
"""Maps a token's ratio (in the graph) and advantage to its summand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch:
    """A few prompt groups with every case in them, float64.

    Attributes:
        logprobs, old_logprobs: per group and response, [T_j]; `logprobs` are leaves that want gradients.
        rewards: per group, one number per response.
    """

    logprobs: list[list[Tensor]]
    old_logprobs: list[list[Tensor]]
    rewards: list[list[float]]

    def counts(self) -> list[list[int]]:
        """Return the tokens of each response, per group."""
        return [[len(response) for response in group] for group in self.logprobs]

    def flat(self, values: list[list[Tensor]]) -> Tensor:
        """Return per-response tensors as one, in the order of group and response."""
        return torch.cat([response for group in values for response in group])

    def per_token(self, values: list[list[float]]) -> Tensor:
        """Return one number per response repeated for each of its tokens, flat."""
        spread = [
            torch.full((len(response),), value, dtype=torch.float64, device=response.device)
            for group, numbers in zip(self.logprobs, values, strict=True)
            for response, value in zip(group, numbers, strict=True)
        ]
        return torch.cat(spread)


def toy_batch(device: torch.device, seed: int = 7) -> ToyBatch:
    """Make three groups of four responses, 1 to 7 tokens each, log-ratios of up to about +-2.

    The last group's rewards are all equal, so that advantages of all three signs occur.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards = [[1.0, -1.0, 1.0, -1.0], [0.25, 0.0, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]
    logprobs: list[list[Tensor]] = []
    old_logprobs: list[list[Tensor]] = []
    for group in rewards:
        logprobs.append([])
        old_logprobs.append([])
        for _ in group:
            length = int(torch.randint(1, 8, (), generator=generator))
            new = -3.0 * torch.rand(length, generator=generator, dtype=torch.float64)
            shift = 0.7 * torch.randn(length, generator=generator, dtype=torch.float64)
            logprobs[-1].append(new.clone().to(device).requires_grad_(True))
            old_logprobs[-1].append((new - shift).to(device))
    return ToyBatch(logprobs=logprobs, old_logprobs=old_logprobs, rewards=rewards)


def advantages_eq4(rewards: list[float]) -> list[float]:
    """Eq. 4 for one group; 0 where it is 0/0."""
    if min(rewards) == max(rewards):
        return [0.0 for _ in rewards]
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / deviation for reward in rewards]


def generalized_advantages_eq2(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 2 as a double sum; `values` has one entry more than `rewards`."""
    last = len(rewards) - 1
    differences = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(last + 1)]
    return [sum((gamma * lam) ** k * differences[t + k] for k in range(last - t + 1)) for t in range(last + 1)]


def token_mean_objective(batch: ToyBatch, term: TokenTerm) -> Tensor:
    """The frame of Eqs. 7, 11, 15 and 17: a mean over a group's tokens, and over prompts."""
    per_prompt = []
    for new, old, rewards in zip(batch.logprobs, batch.old_logprobs, batch.rewards, strict=True):
        advantages = advantages_eq4(rewards)
        terms = [
            term(torch.exp(new[j][t]) / torch.exp(old[j][t]), advantages[j])
            for j in range(len(new))
            for t in range(len(new[j]))
        ]
        per_prompt.append(torch.stack(terms).sum() / sum(len(response) for response in new))
    return torch.stack(per_prompt).mean()


def sequence_mean_objective(batch: ToyBatch, term: TokenTerm) -> Tensor:
    """The frame of Eqs. 3 and 6: a mean over a response's tokens, over responses, and over prompts."""
    per_prompt = []
    for new, old, rewards in zip(batch.logprobs, batch.old_logprobs, batch.rewards, strict=True):
        advantages = advantages_eq4(rewards)
        per_response = []
        for j in range(len(new)):
            ratios = torch.exp(new[j]) / torch.exp(old[j])
            per_response.append(torch.stack([term(ratio, advantages[j]) for ratio in ratios]).sum() / len(new[j]))
        per_prompt.append(torch.stack(per_response).sum() / len(new))
    return torch.stack(per_prompt).mean()


def clip_term(epsilon_low: float, epsilon_high: float) -> TokenTerm:
    """The summand of Eqs. 1, 3, 6 and 7, with the clip as the three cases of Eq. 5."""

    def term(ratio: Tensor, advantage: float) -> Tensor:
        value = float(ratio.detach())
        if value < 1 - epsilon_low:
            clipped = torch.full_like(ratio, 1 - epsilon_low)
        elif value > 1 + epsilon_high:
            clipped = torch.full_like(ratio, 1 + epsilon_high)
        else:
            clipped = ratio
        return torch.minimum(ratio * advantage, clipped * advantage)

    return term


def gppo_term(epsilon_low: float, epsilon_high: float) -> TokenTerm:
    """The summand of Eq. 11, with its bounds that move with the ratio."""

    def term(ratio: Tensor, advantage: float) -> Tensor:
        low = (1 - epsilon_low) / ratio.detach() * ratio
        high = (1 + epsilon_high) / ratio.detach() * ratio
        clipped = torch.minimum(torch.maximum(ratio, low), high)
        return torch.minimum(ratio * advantage, clipped * advantage)

    return term


def general_gppo_term(epsilon_low: float, epsilon_high: float, beta_low: float, beta_high: float) -> TokenTerm:
    """The three cases of Eq. 17."""

    def term(ratio: Tensor, advantage: float) -> Tensor:
        if float(ratio.detach()) < 1 - epsilon_low and advantage < 0:
            return beta_low * (1 - epsilon_low) / ratio.detach() * ratio * advantage
        if float(ratio.detach()) > 1 + epsilon_high and advantage > 0:
            return beta_high * (1 + epsilon_high) / ratio.detach() * ratio * advantage
        return ratio * advantage

    return term


def scale_eq10(ratio: float, advantage: float, epsilon_low: float, epsilon_high: float) -> float:
    """Eq. 10's I_t r_t: the ratio where r A <= clip(r) A, else 0."""
    clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
    return ratio if ratio * advantage <= clipped * advantage else 0.0


def scale_eq16(ratio: float, advantage: float, epsilon_low: float, epsilon_high: float) -> float:
    """Eq. 16's F, its four cases one by one."""
    if ratio < 1 - epsilon_low and advantage < 0:
        return 1 - epsilon_low
    if ratio > 1 + epsilon_high and advantage > 0:
        return 1 + epsilon_high
    if ratio < 1 - epsilon_low and advantage > 0:
        return 1 - epsilon_low
    if ratio > 1 + epsilon_high and advantage < 0:
        return 1 + epsilon_high
    return ratio


def scale_eq18(
    ratio: float, advantage: float, epsilon_low: float, epsilon_high: float, betas: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Eq. 18's F; Eq. 12's when both betas are 1."""
    if ratio < 1 - epsilon_low and advantage < 0:
        return betas[0] * (1 - epsilon_low)
    if ratio > 1 + epsilon_high and advantage > 0:
        return betas[1] * (1 + epsilon_high)
    return ratio


def cispo_objective(batch: ToyBatch, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Eq. 15 with delta clipped and detached, as Eq. 16 has it."""
    per_prompt = []
    for new, old, rewards in zip(batch.logprobs, batch.old_logprobs, batch.rewards, strict=True):
        advantages = advantages_eq4(rewards)
        total = torch.zeros((), dtype=torch.float64, device=new[0].device)
        for j in range(len(new)):
            for t in range(len(new[j])):
                ratio = (torch.exp(new[j][t]) / torch.exp(old[j][t])).detach()
                weight = min(max(float(ratio), 1 - epsilon_low), 1 + epsilon_high)
                total = total + weight * advantages[j] * new[j][t]
        per_prompt.append(total / sum(len(response) for response in new))
    return torch.stack(per_prompt).mean()


def lm_loss_eq8(batch: ToyBatch) -> Tensor:
    """Eq. 8, with log pi, every response a training sequence."""
    sequences = [response for group in batch.logprobs for response in group]
    return -torch.stack([token for response in sequences for token in response]).sum() / len(sequences)


def lm_loss_eq13(batch: ToyBatch, is_correct: list[list[bool]]) -> Tensor:
    """Eq. 13, with log pi."""
    positive = [
        response
        for group, marks in zip(batch.logprobs, is_correct, strict=True)
        for response, mark in zip(group, marks, strict=True)
        if mark
    ]
    return -torch.stack([response.sum() for response in positive]).sum() / sum(len(response) for response in positive)
