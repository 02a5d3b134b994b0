"""Which groups are trained on, how they are split, and what their old logprobs are compared with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_klear.config import AlgorithmSettings, RlSettings
from megatron_klear.records import ScoredGroup
from megatron_klear.session.policy import filtered, minibatches, objective, old_logprobs

MakeGroup = Callable[..., ScoredGroup]

REWARDS: dict[str, list[float | None]] = {
    "mixed": [1, -1, -1],
    "right": [1, 1, 1],
    "wrong": [-1, -1, -1],
    "lost": [None, None, None],
    "alone": [None, 1, None],
    "half": [1, None, -1],
    "partial": [0.25, 0.25, 0.5],
}


@pytest.mark.parametrize(
    ("filtering", "kept"),
    [(True, ["mixed", "half", "partial"]), (False, ["mixed", "right", "wrong", "alone", "half", "partial"])],
)
def test_groups_without_signal_or_without_any_grade_are_left_out(
    make_group: MakeGroup, filtering: bool, kept: list[str]
) -> None:
    groups = [make_group(name, rewards) for name, rewards in REWARDS.items()]
    found = filtered(groups, AlgorithmSettings(filter_zero_advantage=filtering))
    assert [g.group.prompt.prompt_id for g in found] == kept


def test_a_filter_by_correctness_drops_groups_that_differ_in_partial_scores_only(make_group: MakeGroup) -> None:
    groups = [make_group(name, rewards) for name, rewards in REWARDS.items()]
    found = filtered(groups, AlgorithmSettings(filter_metric="correctness"))
    assert [g.group.prompt.prompt_id for g in found] == ["mixed", "half"]


def test_an_advantage_that_is_no_number_is_kept_for_the_finiteness_check(make_group: MakeGroup) -> None:
    group = make_group("mixed", [1, -1])
    broken = replace(group, advantages=np.array([math.nan, 0.0], dtype=np.float32))
    assert filtered([broken], AlgorithmSettings()) == [broken]


@pytest.mark.parametrize(
    ("groups", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [3, 2]), (8, [4, 4]), (9, [3, 3, 3]), (16, [4, 4, 4, 4])]
)
def test_what_the_filter_left_makes_as_few_updates_as_fit_and_even_ones(
    make_group: MakeGroup, groups: int, sizes: list[int]
) -> None:
    made = [make_group(f"g{i}", [1, -1]) for i in range(groups)]
    parts = list(minibatches(made, RlSettings(prompts_per_step=16, minibatch_prompts=4)))
    assert [len(part) for part in parts] == sizes
    assert [group for part in parts for group in part] == made


def test_every_setting_of_the_objective_arrives() -> None:
    settings = AlgorithmSettings(kind="cispo", epsilon_low=0.1, epsilon_high=0.4, beta_low=0.5, beta_high=2.0)
    found = objective(settings)
    for name in ("kind", "epsilon_low", "epsilon_high", "beta_low", "beta_high"):
        assert getattr(found, name) == getattr(settings, name)


def test_old_logprobs_are_the_trainers(make_group: MakeGroup) -> None:
    """At the rollouts' temperature, for graded responses alone, by name."""
    groups = [make_group("a", [1, -1]), make_group("b", [None, 1, -1])]
    rng = np.random.default_rng(0)
    asked: dict[str, Any] = {}
    answered: dict[str, np.ndarray] = {}

    def token_logprobs(sequences: list[Any], *, temperature: float) -> list[np.ndarray]:
        asked.update(ids=[s.sequence_id for s in sequences], temperature=temperature)
        scored = [rng.normal(-1.0, 0.1, len(s.token_ids)).astype(np.float32) for s in sequences]
        answered.update({s.sequence_id: values for s, values in zip(sequences, scored, strict=True)})
        return scored

    session: Any = SimpleNamespace(
        trainer=SimpleNamespace(token_logprobs=token_logprobs),
        settings=SimpleNamespace(rollout=SimpleNamespace(temperature=0.7)),
        phase=lambda name: contextlib.nullcontext(),
    )
    by_name = old_logprobs(session, groups)
    assert asked == {"ids": ["a#0", "a#1", "b#1", "b#2"], "temperature": 0.7}
    assert list(by_name) == asked["ids"]
    assert all(np.array_equal(by_name[name], answered[name]) for name in asked["ids"])
    assert old_logprobs(session, []) == {}
