"""Steps out of a ledger, with the advantages of Eq. 4."""

from __future__ import annotations

import math

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade
from megatron_klear.rollout.ledger import LedgerReader, Terms, check_replay, replay_step
from megatron_klear.rollout.ledger.terms import enforce


def test_a_step_is_replayed_in_its_order_with_its_advantages(ledger, file, make_prompt, make_rollout):
    rewards = {"a": [1.0, -1.0, -1.0], "b": [1.0, 1.0, 1.0], "c": [1.0, None, -1.0]}
    ids = ledger.reserve([(0, make_prompt(name)) for name in rewards], num_responses=3)
    for group, values in zip(ids, rewards.values(), strict=True):
        for index in range(3):
            ledger.save_response(group, index, make_rollout((0, 3), seed=index))
        ledger.save_grades(group, [
            Grade(outcome="ungraded", reward=0.0) if value is None
            else Grade(outcome="correct" if value > 0 else "wrong", reward=value)
            for value in values
        ])  # fmt: skip
    ledger.commit(4, [ids[2], ids[0], ids[1]])
    ledger.trained(4)
    with LedgerReader(file) as reader:
        groups = replay_step(reader, 4, normalize_std=True)
        plain = replay_step(reader, 4, normalize_std=False)
        with pytest.raises(RolloutError, match=r"no groups of step 5 to replay; it holds steps 4 to 4: choose with"):
            replay_step(reader, 5, normalize_std=True)
    assert [g.group.prompt.prompt_id for g in groups] == ["c", "a", "b"]
    # a: mean -1/3, standard deviation sqrt(8/9); c: mean 0 and deviation 1 over the two that are graded.
    expected = {"a": [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)], "b": [0, 0, 0], "c": [1, 0, -1]}
    for group in groups:
        assert group.advantages.tolist() == pytest.approx(expected[group.group.prompt.prompt_id], rel=1e-6)
    assert plain[1].advantages.tolist() == pytest.approx([4 / 3, -2 / 3, -2 / 3], rel=1e-6)
    assert groups[0].graded.tolist() == [True, False, True]
    assert groups[1].is_correct.tolist() == [True, False, False]


def test_a_step_whose_tokens_were_removed_says_so(ledger, file, advance):
    advance(ledger, "a", "trained", step=1)
    ledger.prune(1)
    with LedgerReader(file) as reader, pytest.raises(RolloutError, match=r"scheduling\.keep_steps"):
        replay_step(reader, 1, normalize_std=True)


def test_a_prompt_that_a_step_holds_from_two_epochs_has_two_names(ledger, file, make_prompt, make_rollout):
    """The trainer knows sequences by name: one name for two responses would mix up their log-probabilities."""
    ids = ledger.reserve([(0, make_prompt("a")), (1, make_prompt("b")), (1, make_prompt("a"))], num_responses=1)
    for seed, group in enumerate(ids):
        ledger.save_response(group, 0, make_rollout((0, 3 + seed), seed=seed))
        ledger.save_grades(group, [Grade(outcome="correct", reward=1.0)])
    ledger.commit(1, ids)
    ledger.trained(1)
    with LedgerReader(file) as reader:
        groups = replay_step(reader, 1, normalize_std=True)
        assert reader.trained_not_once() == []
    assert [g.group.prompt.prompt_id for g in groups] == ["a", "b", "a of epoch 1"]
    assert [len(g.group.rollouts[0].response_ids) for g in groups] == [3, 4, 5]


def test_a_replay_under_other_settings_is_refused_or_told(ledger, file):
    recorded = Terms(
        sampling={"rollout.temperature": 1.0, "rollout.top_p": 1.0, "rollout.stop_tokens": ("</a>",)},
        grading={"reward.wrong": -1.0},
    )
    with LedgerReader(file) as reader:
        assert check_replay(reader, recorded) == "", "an old ledger does not say"
    enforce(ledger, recorded, step=0, num_responses=2)
    other = Terms(sampling={**recorded.sampling, "rollout.top_p": 0.9}, grading={"reward.wrong": 0.0})
    hotter = Terms(sampling={**other.sampling, "rollout.temperature": 0.6}, grading=recorded.grading)
    with LedgerReader(file) as reader:
        assert check_replay(reader, recorded) == ""
        assert check_replay(reader, other) == "rollout.top_p: 1.0 there, 0.9 here; reward.wrong: -1.0 there, 0.0 here"
        with pytest.raises(RolloutError, match=r"\(rollout.temperature: 1.0 there, 0.6 here\); .*replay_from"):
            check_replay(reader, hotter)
