"""Transitions of the ledger: what they store, that they may be repeated, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade
from megatron_klear.rollout.ledger import Ledger, LedgerReader

GRADES = [Grade(outcome="correct", reward=1.0, reason="yes"), Grade(outcome="ungraded", reward=0.0, reason="slow")]


def test_a_group_goes_through_all_states_and_comes_back_to_the_bit(ledger, file, make_prompt, make_rollout):
    prompt = make_prompt("p")
    [group] = ledger.reserve([(0, prompt)], num_responses=2)
    first, second = make_rollout((3, 5), (4, 2)), make_rollout((4, 7), finish="length", seed=1)
    seen = [ledger.states()]
    assert ledger.save_response(group, 1, second) is False
    assert ledger.save_response(group, 0, first, attempts=3) is True
    seen.append(ledger.states())
    ledger.save_grades(group, GRADES)
    seen.append(ledger.states())
    ledger.commit(7, [group])
    seen.append(ledger.states())
    assert ledger.trained(7) == 1
    seen.append(ledger.states())
    assert [list(states) for states in seen] == [["reserved"], ["generated"], ["graded"], ["committed"], ["trained"]]

    ledger.close()
    with LedgerReader(file) as reader:
        [stored] = reader.groups_of_step(7)
    assert (stored.epoch, stored.state, stored.step, stored.place, stored.oldest_version) == (0, "trained", 7, 0, 3)
    assert stored.prompt.prompt_id == "p"
    assert (stored.prompt.reference, stored.prompt.text, stored.prompt.domain) == ("4", "text of p", "math")
    assert np.array_equal(stored.prompt.token_ids, prompt.token_ids)
    assert stored.prompt.token_ids.dtype == np.int64
    for index, given in enumerate([first, second]):
        rollout = stored.rollouts[index]
        assert np.array_equal(rollout.response_ids, given.response_ids)
        assert rollout.rollout_logprobs.tobytes() == given.rollout_logprobs.tobytes()
        assert rollout.policy_versions == given.policy_versions
        assert rollout.finish_reason == given.finish_reason
    assert [stored.grades[i] for i in range(2)] == GRADES


def test_every_transition_can_be_repeated(ledger, make_prompt, make_rollout):
    prompts = [(0, make_prompt("p")), (0, make_prompt("q")), (1, make_prompt("p"))]
    groups = ledger.reserve(prompts, num_responses=1)
    assert len(set(groups)) == 3
    assert ledger.reserve(prompts, num_responses=1) == groups
    rollout = make_rollout((0, 3))
    assert ledger.save_response(groups[0], 0, rollout)
    assert ledger.save_response(groups[0], 0, rollout)
    for _ in range(2):
        ledger.save_grades(groups[0], GRADES[:1])
    for _ in range(2):
        ledger.commit(1, [groups[0]])
    assert [ledger.trained(1), ledger.trained(1)] == [1, 0]
    ledger.commit(1, [groups[0]])
    assert ledger.states() == {"reserved": 2, "trained": 1}


def test_partial_response_is_replaced_by_its_continuation(ledger, make_prompt, make_rollout):
    [group] = ledger.reserve([(0, make_prompt("p"))], num_responses=1)
    assert not ledger.save_response(group, 0, make_rollout((0, 2), finish="abort"))
    assert not ledger.save_response(group, 0, make_rollout((0, 2), (1, 3), finish="abort"))
    assert ledger.load([group])[0].rollouts[0].policy_versions == ((0, 2), (1, 3))
    assert not ledger.load([group])[0].is_complete
    assert ledger.save_response(group, 0, make_rollout((0, 2), (1, 3), (2, 1)))
    assert ledger.load([group])[0].is_complete


def test_what_does_not_fit_the_state_is_refused_and_changes_nothing(ledger, advance, make_prompt, make_rollout):
    reserved, generated = advance(ledger, "r", "reserved"), advance(ledger, "g", "generated")
    committed = advance(ledger, "c", "committed", step=1)
    before = ledger.connection.execute("SELECT * FROM groups").fetchall()
    for call in (
        lambda: ledger.save_grades(reserved, GRADES),
        lambda: ledger.save_grades(generated, GRADES[:1]),
        lambda: ledger.commit(1, [generated]),
        lambda: ledger.commit(2, [committed]),
        lambda: ledger.save_response(generated, 0, make_rollout((9, 9))),
        lambda: ledger.save_response(generated, 5, make_rollout((9, 9))),
        lambda: ledger.save_response(999, 0, make_rollout((9, 9))),
        lambda: ledger.reserve([(0, make_prompt("new")), (0, make_prompt("r", length=9))], num_responses=2),
    ):
        with pytest.raises(RolloutError):
            call()
    assert ledger.connection.execute("SELECT * FROM groups").fetchall() == before


def test_places_in_a_step_go_on_where_they_ended(ledger, advance):
    groups = [advance(ledger, name, "graded") for name in "abcd"]
    ledger.commit(1, [groups[2], groups[0]])
    ledger.commit(1, [groups[2], groups[0], groups[3]])
    assert ledger.of_step(1) == [groups[2], groups[0], groups[3]]
    assert ledger.unfinished() == groups


def test_a_transaction_is_all_or_nothing(ledger, make_prompt):
    def broken():
        with ledger.transaction():
            ledger.reserve([(0, make_prompt("p"))], num_responses=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert ledger.states() == {}
    with ledger.transaction():
        ledger.reserve([(0, make_prompt("p"))], num_responses=1)
    assert ledger.states() == {"reserved": 1}


def test_pruning_removes_tokens_of_old_steps_only(ledger, advance):
    old, new, waiting = (
        advance(ledger, "old", "trained", step=1),
        advance(ledger, "new", "trained", step=2),
        advance(ledger, "waiting", "graded"),
    )
    assert ledger.prune(1) == 2
    assert ledger.prune(1) == 0
    stored = {group.group_id: group for group in ledger.load([old, new, waiting])}
    assert [stored[i].is_complete for i in (old, new, waiting)] == [False, True, True]
    rows = ledger.connection.execute("SELECT COUNT(*) FROM responses WHERE group_id = ?", [old]).fetchone()
    assert rows == (2,), "lengths and rewards stay"


def test_closed_twice_is_closed_once(file):
    ledger = Ledger(file)
    ledger.close()
    ledger.close()
    Ledger(file).close()
