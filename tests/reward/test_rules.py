"""Reward values, answer format, and counting."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_klear.errors import ConfigError
from megatron_klear.records import Grade
from megatron_klear.reward import AnswerFormat, RewardRules, count_outcomes


def test_default_rewards_are_binary_and_penalise_malformed() -> None:
    rules = RewardRules()
    assert [rules.grade(outcome, "").reward for outcome in ("correct", "wrong", "malformed")] == [1.0, -1.0, -1.0]


def test_a_grade_carries_outcome_reward_and_reason() -> None:
    rules = RewardRules(correct=2, wrong=0.5, malformed=-3.0)
    assert rules.grade("correct", "r") == Grade(outcome="correct", reward=2.0, reason="r")
    assert rules.grade("wrong", "r") == Grade(outcome="wrong", reward=0.5, reason="r")
    assert rules.grade("malformed", "r") == Grade(outcome="malformed", reward=-3.0, reason="r")
    assert rules.grade("ungraded", "r") == Grade(outcome="ungraded", reward=0.0, reason="r")
    with pytest.raises(ValueError, match="partial"):
        rules.grade("partial", "")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"malformed": 0.0}, ["reward.malformed"]),
        ({"correct": -1.0}, ["reward.correct"]),
        ({"correct": 0.0, "wrong": 0.5, "malformed": 1.0}, ["reward.correct", "reward.malformed"]),
        ({"correct": math.nan, "wrong": math.inf}, ["reward.correct", "reward.wrong"]),
    ],
)
def test_rewards_out_of_order_are_refused_with_all_problems(values: dict[str, float], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardRules(**values)
    assert [problem.split(":")[0] for problem in caught.value.problems] == names


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"think_start": " "}, "tokenizer.think_start"),
        ({"think_start": "<t>", "think_end": "<t>"}, "tokenizer.think_end"),
        ({"think_start": "think>", "think_end": "</think>"}, "tokenizer.think_end"),
        ({"max_answer_chars": 0}, "characters of a graded answer"),
        ({"max_answer_chars": 8193}, "characters of a graded answer"),
    ],
)
def test_formats_that_cannot_work_are_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AnswerFormat(**values)


def test_counts_have_every_outcome() -> None:
    rules = RewardRules()
    grades = [rules.grade(outcome, "") for outcome in ("wrong", "correct", "wrong", "ungraded")]
    assert count_outcomes(grades) == {"correct": 1, "wrong": 2, "partial": 0, "malformed": 0, "ungraded": 1}
    assert sum(count_outcomes([]).values()) == 0
