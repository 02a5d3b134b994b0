"""Steps out of a ledger, with the advantages of Eq. 4."""

from __future__ import annotations

import json
import math

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade
from megatron_klear.rollout.ledger import OPENING, Ledger, LedgerReader, Terms, check_replay, replay_step
from megatron_klear.rollout.ledger.spans import spans
from megatron_klear.rollout.ledger.terms import enforce, recorded_opening


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
        assert check_replay(reader, recorded, 1, 9) == "", "an old ledger does not say"
    enforce(ledger, recorded, step=0, num_responses=2)
    other = Terms(sampling={**recorded.sampling, "rollout.top_p": 0.9}, grading={"reward.wrong": 0.0})
    hotter = Terms(sampling={**other.sampling, "rollout.temperature": 0.6}, grading=recorded.grading)
    with LedgerReader(file) as reader:
        assert check_replay(reader, recorded, 1, 9) == ""
        told = check_replay(reader, other, 1, 9)
        assert told == "steps 1 to 9: rollout.top_p: 1.0 there, 0.9 here, reward.wrong: -1.0 there, 0.0 here"
        with pytest.raises(RolloutError, match=r"\(step 3: rollout.temperature: 1.0 there, 0.6 here\); .*replay_from"):
            check_replay(reader, hotter, 3, 3)


def at(temperature: float, wrong: float = -1.0, opening: str = "") -> Terms:
    grading = {"reward.wrong": wrong} | ({OPENING: opening} if opening else {})
    return Terms(sampling={"rollout.temperature": temperature, "rollout.stop_tokens": ("</a>",)}, grading=grading)


def test_each_step_of_a_replay_is_judged_by_what_it_was_recorded_with(ledger, file):
    enforce(ledger, at(1.0), step=0, num_responses=2)
    enforce(ledger, at(1.0), step=4, num_responses=2)
    enforce(ledger, at(0.6), step=10, num_responses=2)
    enforce(ledger, at(0.6, wrong=0.0), step=15, num_responses=2)
    with LedgerReader(file) as reader:
        assert [(span.first, span.last) for span in spans(reader.fact)] == [(1, 10), (11, 15), (16, None)]
        assert check_replay(reader, at(1.0), 1, 10) == ""
        assert check_replay(reader, at(0.6), 11, 15) == ""
        told = "steps 16 to 20: reward.wrong: 0.0 there, -1.0 here"
        assert check_replay(reader, at(0.6), 11, 20) == told
        with pytest.raises(RolloutError, match=r"settings \(steps 1 to 10: rollout.temperature: 1.0 there, 0.6 here\)"):
            check_replay(reader, at(0.6), 1, 10)
        with pytest.raises(
            RolloutError, match=r"\(steps 11 to 15: [^;]*; step 16: [^;]*1.0 here\); .*apart \(sch.*first"
        ):
            check_replay(reader, at(1.0), 8, 16)


def test_steps_that_a_resume_takes_back_are_of_its_terms(ledger, file):
    """Steps 9 and 10 were trained at 1.0 before the kill, and are drawn anew at 0.6; then all is taken back again."""
    enforce(ledger, at(1.0), step=0, num_responses=2)
    enforce(ledger, at(0.6), step=8, num_responses=2)
    with LedgerReader(file) as reader:
        assert check_replay(reader, at(1.0), 1, 8) == check_replay(reader, at(0.6), 9, 20) == ""
        with pytest.raises(RolloutError, match=r"\(step 9: rollout.temperature: 0.6 there"):
            check_replay(reader, at(1.0), 1, 9)
    enforce(ledger, at(1.0), step=4, num_responses=2)
    with LedgerReader(file) as reader:
        assert check_replay(reader, at(1.0), 1, 20) == ""
    enforce(ledger, at(0.6), step=0, num_responses=2)
    with LedgerReader(file) as reader:
        assert check_replay(reader, at(0.6), 1, 20) == ""


@pytest.mark.parametrize("resumed", [False, True])
def test_an_old_ledger_is_judged_by_its_newest_terms(tmp_path, resumed):
    """One that was written before terms were kept by step, as it is and when its run has gone on."""
    with Ledger(tmp_path / "old.sqlite") as old:
        for name, values in (("sampling", at(0.6).sampling), ("grading", at(0.6).grading)):
            old.set_fact(name, json.dumps(values))
        if resumed:
            enforce(old, at(1.0), step=10, num_responses=2)
    with LedgerReader(tmp_path / "old.sqlite") as reader:
        assert check_replay(reader, at(0.6), 1, 10) == ""
        with pytest.raises(RolloutError, match=r"\(steps 1 to 10: rollout.temperature: 0.6 there, 1.0 here\)"):
            check_replay(reader, at(1.0), 1, 20 if resumed else 10)


def test_what_the_chat_template_opened_goes_by_step(ledger, file):
    enforce(ledger, at(1.0), step=0, num_responses=2)
    enforce(ledger, at(1.0, opening="<think>"), step=2, num_responses=2)
    with LedgerReader(file) as reader:
        opening = recorded_opening(reader)
    assert [opening(step) for step in (1, 2, 3, 9, None)] == ["", "", "<think>", "<think>", "<think>"]


def test_tokens_of_a_run_that_trained_on_nothing_are_of_one_version(ledger, file, advance):
    advance(ledger, "a", "committed", version=3, step=4)
    with LedgerReader(file) as reader:
        [as_recorded] = replay_step(reader, 4, normalize_std=True)
        [of_first] = replay_step(reader, 4, normalize_std=True, version=0)
    assert [r.policy_versions for r in as_recorded.group.rollouts] == [((3, 4),), ((3, 5),)]
    assert [r.policy_versions for r in of_first.group.rollouts] == [((0, 4),), ((0, 5),)]
    assert of_first.advantages.tolist() == as_recorded.advantages.tolist()
