"""Numbers of a rollout batch, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_klear.records import Grade, Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.session.metrics import rollout_metrics, since


def scored(name: str, *answers: tuple[str, float, int]) -> ScoredGroup:
    """A group from (outcome, reward, length) of each response."""
    prompt = Prompt(prompt_id=name, domain="math", token_ids=np.array([1]), reference="1")
    rollouts = tuple(
        Rollout(
            response_ids=np.zeros(length, np.int64),
            rollout_logprobs=np.zeros(length, np.float32),
            finish_reason="length" if length >= 10 else "stop",
            policy_versions=((0, length),),
        )
        for _, _, length in answers
    )
    outcomes = [outcome for outcome, _, _ in answers]
    return ScoredGroup(
        group=RolloutGroup(prompt=prompt, rollouts=rollouts),
        grades=tuple(Grade(outcome=outcome, reward=reward) for outcome, reward, _ in answers),
        rewards=np.array([reward for _, reward, _ in answers], np.float32),
        is_correct=np.array([outcome == "correct" for outcome in outcomes]),
        graded=np.array([outcome != "ungraded" for outcome in outcomes]),
        advantages=np.zeros(len(answers), np.float32),
    )


def test_ungraded_responses_enter_no_mean_and_are_counted():
    groups = [
        scored("a", ("correct", 1.0, 4), ("ungraded", 0.0, 10)),
        scored("b", ("wrong", -1.0, 6), ("malformed", -2.0, 8)),
    ]
    values = rollout_metrics(groups, groups[:1])
    assert values["reward/mean"] == pytest.approx((1 - 1 - 2) / 3)
    assert values["accuracy/train"] == pytest.approx(1 / 3)
    assert values["grades/ungraded"] == 1
    assert values["grades/malformed"] == 1
    assert values["response/length_mean"] == 7
    assert values["response/length_max"] == 10
    assert (values["filter/groups_kept"], values["filter/groups_total"]) == (1, 2)
    assert values["response/truncated_fraction"] == 0.25


def test_graders_that_fail_do_not_look_like_wrong_answers():
    values = rollout_metrics([scored("a", ("ungraded", 0.0, 4), ("ungraded", 0.0, 4))], [])
    assert values["grades/ungraded"] == 2
    assert not {"reward/mean", "reward/std", "accuracy/train"} & values.keys()


def test_counts_of_a_manager_are_told_by_step_and_its_engines_as_they_are():
    before = {"requests/failed": 3.0, "engines/lost": 1.0, "engines/serving": 4.0}
    assert since({}, before) == before
    now = {"requests/failed": 5.0, "engines/lost": 1.0, "engines/serving": 3.0}
    assert since(before, now) == {"requests/failed": 2.0, "engines/lost": 0.0, "engines/serving": 3.0}
