"""The pieces of an RL step between rollouts and updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megatron_klear.algorithm import PolicyObjective, zero_advantage_mask
from megatron_klear.config import AlgorithmSettings, RlSettings
from megatron_klear.records import FloatArray, ScoredGroup
from megatron_klear.session.session import Session
from megatron_klear.trainer import to_score


def objective(settings: AlgorithmSettings) -> PolicyObjective:
    """The policy loss that the settings ask for."""
    return PolicyObjective(
        kind=settings.kind,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        beta_low=settings.beta_low,
        beta_high=settings.beta_high,
    )


def filtered(groups: Sequence[ScoredGroup], settings: AlgorithmSettings) -> list[ScoredGroup]:
    """Groups to train on: those with a graded response and, under the filter, with a nonzero advantage (5.2.5).

    Correct responses of a group that is left out are not in the Phi of Eq. 13 either. With
    `algorithm.filter_metric=correctness`, groups whose responses are all right or all not are left out as well.
    """
    return [
        group
        for group in groups
        if group.graded.any() and not (settings.filter_zero_advantage and _has_no_signal(group, settings.filter_metric))
    ]


def _has_no_signal(group: ScoredGroup, metric: str) -> bool:
    if metric == "correctness" and len(set(group.is_correct[group.graded].tolist())) < 2:
        return True
    return bool(zero_advantage_mask(torch.from_numpy(group.advantages)))


def minibatches(groups: Sequence[ScoredGroup], settings: RlSettings) -> Iterator[list[ScoredGroup]]:
    """Split a step's groups into minibatches of at most `rl.minibatch_prompts` prompts, as few and as even as can be.

    Each minibatch's denominators are its own, so an update weighs the same however many groups the filter left for it.
    """
    count = -(-len(groups) // settings.minibatch_prompts)
    for part in np.array_split(np.arange(len(groups)), count) if count else []:
        yield [groups[i] for i in part]


def old_logprobs(
    session: Session, groups: Sequence[ScoredGroup], *, phase: str = "old logprobs"
) -> dict[str, FloatArray]:
    """Logprobs of pi_old by the trainer, by sequence name (a collective)."""
    sequences = to_score(groups)
    if not sequences:
        return {}
    with session.phase(phase):
        scored = session.trainer.token_logprobs(sequences, temperature=session.settings.rollout.temperature)
    return {s.sequence_id: values for s, values in zip(sequences, scored, strict=True)}
