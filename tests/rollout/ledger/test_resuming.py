"""Checkpoint and ledger brought together after a kill at each instant of a step."""

from __future__ import annotations

import json

import pytest

from megatron_klear.errors import CheckpointError
from megatron_klear.rollout.ledger import Ledger, LedgerPosition, LedgerReader, position, reconcile


def resume(ledger, step, stored, *, identity="same", prompts=None):
    return reconcile(ledger, step, stored, identity=identity, prompts=prompts or {}, num_responses=2)


def states_of(ledger, *groups):
    return [group.state for group in ledger.load(groups)]


def test_position_goes_through_json(ledger, advance):
    advance(ledger, "a", "trained", step=1)
    b = advance(ledger, "b", "graded")
    place = position(ledger, 1)
    assert place.in_flight == ((b, 0, "b"),)
    assert LedgerPosition.from_json(json.loads(json.dumps(place.to_json()))) == place


def test_trained_after_the_checkpoint_is_trained_again_in_the_same_step_and_order(ledger, file, advance):
    advance(ledger, "a", "trained", step=1)
    ids = [advance(ledger, name, "graded", version=1) for name in "bcd"]
    place = position(ledger, 1)
    ledger.commit(2, [ids[2], ids[0], ids[1]])
    ledger.trained(2)
    found = resume(ledger, 1, place)
    assert (found.rolled_back, found.continuing, found.cut_back) == (3, 3, 0)
    assert ledger.of_step(2) == [ids[2], ids[0], ids[1]]
    assert states_of(ledger, *ids) == ["committed"] * 3
    ledger.trained(2)
    with LedgerReader(file) as reader:
        assert reader.trained_not_once() == []
        names = [event for _, event, *_ in reader.events()]
    assert names.count("trained") == 7
    assert names.count("rolled back") == 3


def test_tokens_of_weights_that_are_gone_are_cut_off(ledger, advance, make_prompt, make_rollout):
    place = position(ledger, 1)
    whole = advance(ledger, "whole", "committed", version=1, step=3)
    lost = advance(ledger, "lost", "committed", version=2, step=3)
    [mixed] = ledger.reserve([(0, make_prompt("mixed"))], num_responses=2)
    ledger.save_response(mixed, 0, make_rollout((1, 3), (2, 4)))
    ledger.save_response(mixed, 1, make_rollout((0, 3), (1, 4)))
    found = resume(ledger, 1, place)
    assert found.cut_back == 2
    assert states_of(ledger, whole, lost, mixed) == ["graded", "reserved", "reserved"], "step 3 is no longer promised"
    stored_lost, stored_mixed = ledger.load([lost, mixed])
    assert stored_lost.rollouts == {}
    head, untouched = stored_mixed.rollouts[0], stored_mixed.rollouts[1]
    assert (head.finish_reason, head.policy_versions, len(head.response_ids)) == ("abort", ((1, 3),), 3)
    original = make_rollout((1, 3), (2, 4))
    assert head.response_ids.tolist() == original.response_ids[:3].tolist()
    assert head.rollout_logprobs.tolist() == original.rollout_logprobs[:3].tolist()
    assert (untouched.finish_reason, untouched.policy_versions) == ("stop", ((0, 3), (1, 4)))


def test_the_word_of_the_checkpoint_counts(ledger, advance):
    """A ledger put back from a copy made before the checkpoint: what the weights learned is not taught again."""
    learned = advance(ledger, "learned", "committed", step=1)
    older = advance(ledger, "older", "generated")
    flying = advance(ledger, "flying", "graded")
    place = LedgerPosition(ledger_id=ledger.ledger_id, step=1, last_group=flying, in_flight=((flying, 0, "flying"),))
    assert resume(ledger, 1, place).confirmed == 2
    assert states_of(ledger, learned, older, flying) == ["trained", "trained", "graded"]


def test_a_lost_ledger_is_made_anew_from_the_checkpoint(tmp_path, advance, make_prompt):
    with Ledger(tmp_path / "first.sqlite") as first:
        advance(first, "a", "trained", step=1)
        b, c = advance(first, "b", "generated"), advance(first, "c", "reserved")
        last = advance(first, "e", "trained", step=1)
        place = position(first, 1)
    with Ledger(tmp_path / "second.sqlite") as second:
        found = resume(second, 1, place, prompts={name: make_prompt(name) for name in "abc"})
        assert (found.restored, found.continuing) == (2, 2)
        assert second.unfinished() == [b, c]
        assert second.ledger_id == place.ledger_id
        assert advance(second, "d", "reserved") == last + 1, "the walk is numbered on"
        with pytest.raises(CheckpointError, match="not the ledger"):
            resume(second, 1, LedgerPosition(ledger_id="x", step=1, last_group=3, in_flight=()))
    with Ledger(tmp_path / "third.sqlite") as third, pytest.raises(CheckpointError, match=r"data\.prompts: b, c"):
        resume(third, 1, place)


def test_without_a_checkpoint_groups_are_kept_for_the_same_weights_only(ledger, advance):
    resume(ledger, 0, None)
    group = advance(ledger, "a", "trained", version=0, step=1)
    assert resume(ledger, 0, None).rolled_back == 1
    assert states_of(ledger, group) == ["committed"]
    found = resume(ledger, 0, None, identity="other weights")
    assert found.continuing == 0
    assert ledger.states() == {}


def test_rolled_back_groups_without_tokens_are_drawn_again(ledger, advance):
    group = advance(ledger, "a", "trained", version=0, step=1)
    ledger.prune(1)
    assert resume(ledger, 0, None).cut_back == 1
    assert states_of(ledger, group) == ["reserved"]
