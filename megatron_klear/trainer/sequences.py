"""From scored rollouts (or SFT rows) to weighted training sequences: the one place that scales the loss.

A minibatch's denominators are those of the whole minibatch over all ranks, computed here on the host before any
forward pass. Behind this file the loss is a plain sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_klear.algorithm import lm_token_weights, masked_token_weights, policy_token_weights, sft_token_weights
from megatron_klear.config import AlgorithmSettings
from megatron_klear.records import FloatArray, IntArray, ScoredGroup, TrainSequence


def sft_minibatch(
    rows: Sequence[tuple[str, IntArray, np.ndarray]], normalizer: str = "sequence"
) -> list[TrainSequence]:
    """Weigh SFT rows by Eq. 8.

    Args:
        rows: (id, token ids int64 [L], target mask bool [L]) of the whole batch; entry 0 is never a target.
        normalizer: `sequence` (1 / number of sequences, Eq. 8) or `token` (1 / number of target tokens).
    """
    weights = sft_weights([int(mask.sum()) for _, _, mask in rows], normalizer)
    return [
        sft_sequence(name, token_ids, mask, float(weight))
        for (name, token_ids, mask), weight in zip(rows, weights, strict=True)
    ]


def sft_weights(trained: Sequence[int] | IntArray, normalizer: str = "sequence") -> np.ndarray:
    """Weight of each target token of each row of a whole batch, float [N], from its number of target tokens."""
    return np.asarray(sft_token_weights([int(count) for count in trained], normalizer))  # type: ignore[arg-type]


def sft_sequence(name: str, token_ids: IntArray, mask: np.ndarray, weight: float) -> TrainSequence:
    """One row, its targets (bool [L]) weighted by what `sft_weights` says of it."""
    return _sequence(name, token_ids, lm_weight=masked_token_weights(weight, mask))


def to_score(groups: Sequence[ScoredGroup]) -> list[TrainSequence]:
    """Prompt and response of every graded rollout, without weights, for computing old logprobs."""
    return [
        _sequence(_name(group, j), _token_ids(group, j))
        for group in groups
        for j in range(len(group.group.rollouts))
        if group.graded[j]
    ]


def policy_minibatch(
    groups: Sequence[ScoredGroup],
    old_logprobs: Mapping[str, FloatArray],
    settings: AlgorithmSettings,
    correction: Mapping[str, FloatArray] | None = None,
) -> list[TrainSequence]:
    """Weigh the graded rollouts of one minibatch by Eqs. 11, 13 and 14.

    Args:
        groups: the minibatch's prompt groups, over all ranks.
        old_logprobs: by sequence name, float32 [L] in the token frame, of every graded rollout.
        settings: normaliser, alpha.
        correction: by sequence name, float32 [L], off-policy weights of the policy loss; None is all 1. Denominators
            count tokens whatever these weigh, and the LM loss is not weighted (see `algorithm.off_policy`).
    """
    counts = [
        [len(r.response_ids) if graded else 0 for r, graded in zip(g.group.rollouts, g.graded, strict=True)]
        for g in groups
    ]
    policy = policy_token_weights(counts, settings.normalizer)
    lm = lm_token_weights(counts, [g.is_correct for g in groups], lm_loss_weight=settings.lm_loss_weight)
    sequences = []
    for group, policy_weights, lm_weights in zip(groups, policy, lm, strict=True):
        for j, rollout in enumerate(group.group.rollouts):
            if not group.graded[j]:
                continue
            token_ids = _token_ids(group, j)
            is_response = np.arange(len(token_ids)) >= len(group.group.prompt.token_ids)
            policy_weight = masked_token_weights(float(policy_weights[j]), is_response)
            if correction is not None:
                policy_weight = policy_weight * correction[_name(group, j)]
            sequences.append(
                _sequence(
                    _name(group, j),
                    token_ids,
                    policy_weight=policy_weight,
                    lm_weight=masked_token_weights(float(lm_weights[j]), is_response),
                    advantages=np.where(is_response, group.advantages[j], 0.0),
                    old_logprobs=np.where(is_response, old_logprobs[_name(group, j)], 0.0),
                    rollout_logprobs=_behind(group.group.prompt.token_ids, rollout.rollout_logprobs),
                )
            )
    return sequences


def rollout_logprobs(groups: Sequence[ScoredGroup]) -> dict[str, FloatArray]:
    """Logprobs as the engine sampled them, by sequence name, float32 [L] in the token frame (0 at the prompt)."""
    return {
        _name(g, j): _behind(g.group.prompt.token_ids, rollout.rollout_logprobs)
        for g in groups
        for j, rollout in enumerate(g.group.rollouts)
    }


def _name(group: ScoredGroup, response: int) -> str:
    return f"{group.group.prompt.prompt_id}#{response}"


def _token_ids(group: ScoredGroup, response: int) -> IntArray:
    return np.concatenate([group.group.prompt.token_ids, group.group.rollouts[response].response_ids])


def _behind(prompt: IntArray, values: FloatArray) -> FloatArray:
    return np.concatenate([np.zeros(len(prompt), dtype=np.float32), values.astype(np.float32)])


def _sequence(name: str, token_ids: IntArray, **weights: np.ndarray) -> TrainSequence:
    def field(key: str) -> FloatArray:
        values = weights.get(key)
        return np.zeros(len(token_ids), dtype=np.float32) if values is None else values.astype(np.float32)

    return TrainSequence(
        sequence_id=name,
        token_ids=token_ids,
        policy_weight=field("policy_weight"),
        lm_weight=field("lm_weight"),
        advantages=field("advantages"),
        old_logprobs=field("old_logprobs"),
        rollout_logprobs=field("rollout_logprobs"),
    )
