"""Checkpoint and ledger brought together after a kill at each instant of a step."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from megatron_klear.errors import CheckpointError
from megatron_klear.rollout.ledger import Ledger, LedgerPosition, LedgerReader, Terms, position, reconcile


def resume(ledger, step, stored, *, identity="same", prompts=None, terms=None, num_responses=2, rollout_only=False):
    return reconcile(
        ledger, step, stored, identity=identity, prompts=prompts or {}, num_responses=num_responses,
        terms=terms or Terms(), rollout_only=rollout_only,
    )  # fmt: skip


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


def test_a_checkpoint_says_nothing_of_the_first_weights(ledger, advance):
    """What the run was started from may have gone on since; without the checkpoint it is the first weights again."""
    resume(ledger, 0, None, identity="older")
    advance(ledger, "a", "trained", version=0, step=1)
    resume(ledger, 1, position(ledger, 1), identity="newer, and not read")
    assert ledger.fact("identity") == "older"
    assert resume(ledger, 0, None, identity="newer").continuing == 0
    assert (ledger.states(), ledger.fact("identity")) == ({}, "newer")


def test_rolled_back_groups_without_tokens_are_drawn_again(ledger, advance):
    group = advance(ledger, "a", "trained", version=0, step=1)
    ledger.prune(1)
    assert resume(ledger, 0, None).cut_back == 1
    assert states_of(ledger, group) == ["reserved"]


def test_an_older_copy_of_the_ledger_gets_what_was_in_flight(ledger, file, tmp_path, advance, make_prompt):
    """Copied without its -wal file: what was reserved after it is in the checkpoint only, whose cursor is beyond it."""
    trained = [advance(ledger, name, "reserved") for name in "ab"]
    kept = advance(ledger, "c", "generated")
    ledger.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (tmp_path / "old").mkdir()
    shutil.copy(file, tmp_path / "old" / file.name)
    learned = advance(ledger, "d", "trained", step=1)
    lost = advance(ledger, "e", "graded")
    gone = advance(ledger, "f", "trained", step=1)
    place = position(ledger, 1)
    assert [entry[0] for entry in place.in_flight] == [*trained, kept, lost]
    place = replace(place, in_flight=place.in_flight[2:])  # as if the step before had learned from the first two
    with Ledger(tmp_path / "old" / file.name) as old:
        assert old.ledger_id == place.ledger_id
        with pytest.raises(CheckpointError, match=r"1 prompts that were in flight .* data\.prompts: e"):
            resume(old, 1, place)
        assert old.unfinished() == [*trained, kept], "nothing of a refused resume is kept"
        found = resume(old, 1, place, prompts={name: make_prompt(name) for name in "abcdef"})
        assert (found.restored, found.confirmed, found.continuing) == (1, 2, 2)
        assert old.unfinished() == [kept, lost]
        stored = old.load([kept, lost])
        assert [(g.prompt.prompt_id, g.state) for g in stored] == [("c", "generated"), ("e", "reserved")]
        assert advance(old, "g", "reserved") == gone + 1, "no group id is given out twice"
        assert resume(old, 1, place).restored == 0, "a second time there is nothing to do"
        assert advance(old, "h", "reserved") == gone + 2
    assert learned < lost < gone


def test_a_ledger_that_went_another_way_than_the_checkpoint_is_refused(ledger, advance, make_prompt):
    group = advance(ledger, "a", "reserved")
    other = advance(ledger, "b", "reserved")
    prompts = {name: make_prompt(name) for name in "abc"}
    for entry in ((group, 0, "c"), (other + 5, 0, "b"), (group, 0, "b")):
        place = LedgerPosition(ledger_id=ledger.ledger_id, step=1, last_group=other + 5, in_flight=(entry,))
        with pytest.raises(CheckpointError, match=f"contradicts the newest checkpoint: there group {entry[0]} is"):
            resume(ledger, 1, place, prompts=prompts)
    assert ledger.unfinished() == [group, other]


HOT = Terms(sampling={"rollout.temperature": 1.0, "rollout.top_p": 1.0}, grading={"reward.wrong": -1.0})
COLD = Terms(sampling={"rollout.temperature": 0.6, "rollout.top_p": 1.0}, grading={"reward.wrong": -1.0})
STRICT = Terms(sampling=HOT.sampling, grading={"reward.wrong": -2.0})


@pytest.fixture
def in_flight(ledger, advance, make_prompt, make_rollout):
    """Groups of a run under `HOT`, in every state: one of step 1 trained, one promised to step 2, a head."""
    resume(ledger, 0, None, terms=HOT)
    names = {"trained": 1, "committed": 2, "graded": 0, "generated": 0, "reserved": 0}
    groups = {state: advance(ledger, state, state, step=step) for state, step in names.items()}
    [groups["head"]] = ledger.reserve([(0, make_prompt("head"))], num_responses=2)
    ledger.save_response(groups["head"], 0, make_rollout((0, 3), finish="abort"))
    return groups


def test_responses_in_flight_are_drawn_anew_under_other_sampling_settings(ledger, in_flight):
    place = position(ledger, 1)
    assert resume(ledger, 1, place, terms=HOT).other_terms.why == ""
    assert states_of(ledger, *in_flight.values())[:4] == ["trained", "committed", "graded", "generated"]
    found = resume(ledger, 1, place, terms=COLD).other_terms
    assert (found.redrawn, found.regraded, found.why) == (4, 0, "rollout.temperature: 1.0 -> 0.6")
    trained, *others = ledger.load(in_flight.values())
    assert (trained.state, len(trained.rollouts), len(trained.grades)) == ("trained", 2, 2), "history stays"
    assert {(g.state, g.step, len(g.rollouts)) for g in others} == {("reserved", None, 0)}
    assert [g.draws for g in others] == [1, 1, 1, 0, 1]
    assert resume(ledger, 1, place, terms=COLD).other_terms.why == "", "the new settings are those of the ledger now"
    assert json.loads(ledger.fact("sampling")) == COLD.sampling


def test_also_before_the_first_checkpoint(ledger, in_flight):
    found = resume(ledger, 0, None, terms=COLD).other_terms
    assert (found.redrawn, found.why) == (5, "rollout.temperature: 1.0 -> 0.6")
    assert {g.state for g in ledger.load(in_flight.values())} == {"reserved"}


def test_under_other_rewards_responses_are_kept_and_graded_anew(ledger, file, in_flight):
    before = {g.group_id: g for g in ledger.load(in_flight.values())}
    found = resume(ledger, 1, position(ledger, 1), terms=STRICT).other_terms
    assert (found.redrawn, found.regraded, found.why) == (0, 2, "reward.wrong: -1.0 -> -2.0")
    for name, state in {
        "trained": "trained",
        "committed": "generated",
        "graded": "generated",
        "head": "reserved",
    }.items():
        [group] = ledger.load([in_flight[name]])
        assert (group.state, len(group.grades)) == (state, 2 if name == "trained" else 0)
        old = before[group.group_id].rollouts
        assert {i: r.response_ids.tolist() for i, r in group.rollouts.items()} == {
            i: r.response_ids.tolist() for i, r in old.items()
        }
    with LedgerReader(file) as reader:
        assert [d for _, event, *_, d in reader.events() if event == "graded again"] == [found.why] * 2


def test_a_ledger_that_does_not_say_its_settings_is_not_trusted(tmp_path, advance):
    with Ledger(tmp_path / "older.sqlite") as older:
        group = advance(older, "a", "graded")
        found = resume(older, 1, position(older, 1), terms=HOT).other_terms
        assert found.redrawn == 1
        assert "does not say under which settings its responses were drawn" in found.why
        assert states_of(older, group) == ["reserved"]


@pytest.mark.parametrize("number", [1, 3])
def test_groups_in_flight_take_another_number_of_responses(ledger, in_flight, make_rollout, number):
    found = resume(ledger, 1, position(ledger, 1), terms=HOT, num_responses=number).other_terms
    assert (found.redrawn, found.why) == (4, f"rollout.responses_per_prompt is now {number}")
    trained, *others = ledger.load(in_flight.values())
    assert trained.num_responses == 2
    assert {(g.num_responses, g.state, len(g.rollouts)) for g in others} == {(number, "reserved", 0)}
    group = in_flight["committed"]
    done = [ledger.save_response(group, i, make_rollout((1, 3))) for i in range(number)]
    assert done == [False] * (number - 1) + [True]


def test_steps_that_were_generated_with_no_training_keep_their_responses(ledger, in_flight):
    """With `scheduling.rollout_only` a step is done when it is committed."""
    found = resume(ledger, 2, position(ledger, 2), terms=COLD, num_responses=3).other_terms
    assert found.redrawn == 3
    [kept] = ledger.load([in_flight["committed"]])
    assert (kept.state, kept.step, kept.num_responses, len(kept.grades)) == ("committed", 2, 2, 2)


def test_steps_that_were_only_recorded_are_not_lost_in_silence(ledger, file, tmp_path, advance, make_prompt):
    """With `scheduling.rollout_only` a step that the ledger has not got is nowhere, and nothing would draw it again."""
    for step in (1, 2):
        advance(ledger, f"step {step}", "committed", version=step - 1, step=step)
    ledger.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (tmp_path / "old").mkdir()
    shutil.copy(file, tmp_path / "old" / file.name)
    advance(ledger, "step 3", "committed", version=2, step=3)
    place = position(ledger, 3)
    how = {"prompts": {f"step {i}": make_prompt(f"step {i}") for i in (1, 2, 3)}, "rollout_only": True}
    assert resume(ledger, 3, place, **how).restored == 0
    assert (ledger.of_step(3), ledger.fact("rollout_only")) == ([3], "true")
    for name, told in (("new", "lacks 3 of the 3 steps .* step 1;"), ("old", "lacks 1 of the 3 steps .* step 3;")):
        (tmp_path / name).mkdir(exist_ok=True)
        for _ in range(2):  # a start that was refused does not have the next one go on
            with (
                Ledger(tmp_path / name / file.name) as other,
                pytest.raises(CheckpointError, match=f"{told} put back the ledger .* another run.dir"),
            ):
                resume(other, 3, place, **how)
