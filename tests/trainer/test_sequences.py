"""Denominators and masks of a minibatch, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_klear.config import AlgorithmSettings
from megatron_klear.records import FloatArray, Grade, Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.trainer import policy_minibatch, rollout_logprobs, sft_minibatch, to_score

ALPHA = 0.25


def group(
    name: str,
    prompt_tokens: int,
    lengths: Sequence[int],
    advantages: Sequence[float],
    *,
    correct: Sequence[int] = (),
    ungraded: Sequence[int] = (),
) -> ScoredGroup:
    """A prompt with responses of these lengths; tokens and logprobs tell where they come from."""
    rollouts = tuple(
        Rollout(
            response_ids=np.arange(length, dtype=np.int64) + 100 * (j + 1),
            rollout_logprobs=-np.arange(1, length + 1, dtype=np.float32) / 10 - j,
            finish_reason="stop",
            policy_versions=((0, length),),
        )
        for j, length in enumerate(lengths)
    )
    prompt = Prompt(prompt_id=name, domain="math", token_ids=np.arange(prompt_tokens), reference="1")
    graded = np.array([j not in ungraded for j in range(len(lengths))])
    return ScoredGroup(
        group=RolloutGroup(prompt=prompt, rollouts=rollouts),
        grades=tuple(Grade(outcome="wrong", reward=0.0) for _ in lengths),
        rewards=np.zeros(len(lengths), dtype=np.float32),
        is_correct=np.array([j in correct for j in range(len(lengths))]),
        graded=graded,
        advantages=np.array(advantages, dtype=np.float32),
    )


@pytest.fixture
def groups() -> list[ScoredGroup]:
    """Two prompts; trained tokens 4 + 6 in the first (its middle response is ungraded), 2 + 3 + 5 in the second."""
    return [
        group("p", 3, [4, 7, 6], [1.0, 9.0, -1.0], correct=[0, 1], ungraded=[1]),
        group("q", 2, [2, 3, 5], [0.5, -0.25, -0.25], correct=[0]),
    ]


def old(groups: Sequence[ScoredGroup]) -> dict[str, FloatArray]:
    """Old logprobs that are not 0 even in the prompt, where nothing may come of them."""
    return {s.sequence_id: -np.arange(1, len(s.token_ids) + 1, dtype=np.float32) for s in to_score(groups)}


# Weight of a token, by sequence, from the equations.
BY_HAND = {
    "group": {"p#0": 1 / (2 * 10), "p#2": 1 / (2 * 10), "q#0": 1 / (2 * 10), "q#1": 1 / (2 * 10), "q#2": 1 / (2 * 10)},
    "batch": {"p#0": 1 / 20, "p#2": 1 / 20, "q#0": 1 / 20, "q#1": 1 / 20, "q#2": 1 / 20},
    "sequence": {
        "p#0": 1 / (2 * 2 * 4),
        "p#2": 1 / (2 * 2 * 6),
        "q#0": 1 / (2 * 3 * 2),
        "q#1": 1 / (2 * 3 * 3),
        "q#2": 1 / (2 * 3 * 5),
    },
}
PROMPT_TOKENS = {"p": 3, "q": 2}


@pytest.mark.parametrize("normalizer", ["group", "batch", "sequence"])
def test_policy_weights_by_hand_and_prompts_masked(groups: list[ScoredGroup], normalizer: str) -> None:
    settings = AlgorithmSettings(normalizer=normalizer, lm_loss_weight=ALPHA)
    sequences = policy_minibatch(groups, old(groups), settings)
    assert [s.sequence_id for s in sequences] == ["p#0", "p#2", "q#0", "q#1", "q#2"]
    for s in sequences:
        prompt = PROMPT_TOKENS[s.sequence_id[0]]
        assert s.policy_weight.dtype == np.float32
        assert not s.policy_weight[:prompt].any()
        np.testing.assert_allclose(s.policy_weight[prompt:], BY_HAND[normalizer][s.sequence_id], rtol=1e-6)


def test_group_and_batch_differ_when_groups_do() -> None:
    uneven = [group("p", 1, [1, 1], [1.0, -1.0]), group("q", 1, [10, 20], [1.0, -1.0])]
    by_group = policy_minibatch(uneven, old(uneven), AlgorithmSettings(normalizer="group"))
    by_batch = policy_minibatch(uneven, old(uneven), AlgorithmSettings(normalizer="batch"))
    np.testing.assert_allclose([s.policy_weight[-1] for s in by_group], [1 / 4, 1 / 4, 1 / 60, 1 / 60], rtol=1e-6)
    np.testing.assert_allclose([s.policy_weight[-1] for s in by_batch], [1 / 32] * 4, rtol=1e-6)


def test_lm_weights_cover_correct_graded_responses_alone(groups: list[ScoredGroup]) -> None:
    """Eq. 13: over Phi of the whole minibatch, which is p#0 (4 tokens) and q#0 (2); p#1 is correct but ungraded."""
    for s in policy_minibatch(groups, old(groups), AlgorithmSettings(lm_loss_weight=ALPHA)):
        prompt = PROMPT_TOKENS[s.sequence_id[0]]
        expected = ALPHA / (4 + 2) if s.sequence_id in ("p#0", "q#0") else 0.0
        np.testing.assert_allclose(s.lm_weight[prompt:], expected, rtol=1e-6)
        assert not s.lm_weight[:prompt].any()


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_no_correct_response_or_no_alpha_gives_no_lm_loss(alpha: float) -> None:
    none_right = [group("p", 2, [3, 4], [1.0, -1.0], correct=[] if alpha else [0])]
    for s in policy_minibatch(none_right, old(none_right), AlgorithmSettings(lm_loss_weight=alpha)):
        assert not s.lm_weight.any()
        assert s.policy_weight.any()


def test_off_policy_weights_multiply_the_policy_alone_and_leave_denominators(groups: list[ScoredGroup]) -> None:
    settings = AlgorithmSettings(lm_loss_weight=ALPHA)
    rng = np.random.default_rng(0)
    correction = {name: rng.choice([0.0, 0.5, 1.5], len(v)).astype(np.float32) for name, v in old(groups).items()}
    plain = policy_minibatch(groups, old(groups), settings)
    corrected = policy_minibatch(groups, old(groups), settings, correction)
    for one, other in zip(plain, corrected, strict=True):
        weights = correction[one.sequence_id]
        # One sequence's weights change no other token: the denominators count tokens, whatever they weigh.
        np.testing.assert_array_equal(other.policy_weight, one.policy_weight * weights)
        assert other.policy_weight.dtype == np.float32
        np.testing.assert_array_equal(other.lm_weight, one.lm_weight)
        np.testing.assert_array_equal(other.advantages, one.advantages)


def test_advantages_and_logprobs_stand_at_their_tokens(groups: list[ScoredGroup]) -> None:
    for s in policy_minibatch(groups, old(groups), AlgorithmSettings()):
        scored = groups["pq".index(s.sequence_id[0])]
        j, prompt = int(s.sequence_id[2]), PROMPT_TOKENS[s.sequence_id[0]]
        rollout = scored.group.rollouts[j]
        np.testing.assert_array_equal(s.token_ids, [*range(prompt), *rollout.response_ids])
        np.testing.assert_array_equal(s.advantages, [0.0] * prompt + [scored.advantages[j]] * len(rollout.response_ids))
        np.testing.assert_array_equal(s.rollout_logprobs, [0.0] * prompt + rollout.rollout_logprobs.tolist())
        positions = range(prompt + 1, len(s.token_ids) + 1)
        np.testing.assert_array_equal(s.old_logprobs, [0.0] * prompt + [-float(i) for i in positions])


def test_a_group_without_a_graded_response_leaves_no_trace(groups: list[ScoredGroup]) -> None:
    lost = group("lost", 2, [5, 5], [0.0, 0.0], correct=[0], ungraded=[0, 1])
    alone = policy_minibatch(groups, old(groups), AlgorithmSettings())
    beside = policy_minibatch([lost, *groups], old(groups), AlgorithmSettings())
    assert [s.sequence_id for s in beside] == [s.sequence_id for s in alone]
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one.policy_weight, other.policy_weight)
        np.testing.assert_array_equal(one.lm_weight, other.lm_weight)


def test_what_is_scored_is_every_graded_rollout_without_weights(groups: list[ScoredGroup]) -> None:
    scored = to_score(groups)
    assert [s.sequence_id for s in scored] == ["p#0", "p#2", "q#0", "q#1", "q#2"]
    assert [len(s.token_ids) for s in scored] == [7, 9, 4, 5, 7]
    for s in scored:
        for values in (s.policy_weight, s.lm_weight, s.advantages, s.old_logprobs, s.rollout_logprobs):
            assert values.shape == s.token_ids.shape
            assert values.dtype == np.float32
            assert not values.any()


def test_rollout_logprobs_by_name_in_the_token_frame(groups: list[ScoredGroup]) -> None:
    named = rollout_logprobs(groups)
    assert set(named) == {"p#0", "p#1", "p#2", "q#0", "q#1", "q#2"}
    np.testing.assert_allclose(named["q#1"], [0, 0, -1.1, -1.2, -1.3], rtol=1e-6)


ROWS = [
    ("a", np.arange(5), np.array([False, False, True, True, True])),
    ("b", np.arange(3), np.array([False, False, True])),
    ("c", np.arange(4), np.array([False, False, False, False])),
]


@pytest.mark.parametrize(("normalizer", "weight"), [("sequence", 1 / 2), ("token", 1 / 4)])
def test_sft_weights_by_hand(normalizer: str, weight: float) -> None:
    """Eq. 8 is a mean over sequences that have targets: c has none."""
    sequences = sft_minibatch(ROWS, normalizer)
    assert [s.sequence_id for s in sequences] == ["a", "b", "c"]
    for s, (_, token_ids, mask) in zip(sequences, ROWS, strict=True):
        np.testing.assert_array_equal(s.token_ids, token_ids)
        np.testing.assert_allclose(s.lm_weight, np.where(mask, weight, 0.0), rtol=1e-6)
        for values in (s.policy_weight, s.advantages, s.old_logprobs, s.rollout_logprobs):
            assert not values.any()


def test_an_unknown_normalizer_is_refused(groups: list[ScoredGroup]) -> None:
    with pytest.raises(ValueError, match="normalizer is 'mean', allowed are"):
        sft_minibatch(ROWS, "mean")
    settings = replace(AlgorithmSettings(), normalizer="group")
    object.__setattr__(settings, "normalizer", "mean")
    with pytest.raises(ValueError, match="normalizer is 'mean', allowed are group, sequence, batch"):
        policy_minibatch(groups, old(groups), settings)
