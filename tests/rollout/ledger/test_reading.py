"""Which groups and responses a filter lets through, and what their lines say."""

from __future__ import annotations

import pytest

from megatron_klear.records import Grade
from megatron_klear.rollout.ledger import GroupFilter, LedgerReader


@pytest.fixture
def reader(ledger, file, advance, make_prompt, make_rollout):
    """Two steps trained, one group without grades, one unfinished, one not begun."""
    advance(ledger, "a", "trained", version=0, step=1)
    advance(ledger, "b", "trained", version=1, step=2)
    advance(ledger, "a", "generated", version=2, epoch=1)
    [mixed] = ledger.reserve([(0, make_prompt("mixed"))], num_responses=2)
    ledger.save_response(mixed, 0, make_rollout((2, 3), (3, 6), finish="abort"))
    [odd] = ledger.reserve([(0, make_prompt("odd_1"))], num_responses=1)
    ledger.save_response(odd, 0, make_rollout((3, 2)))
    ledger.save_grades(odd, [Grade(outcome="ungraded", reward=0.0, reason="timeout")])
    ledger.reserve([(1, make_prompt("b"))], num_responses=2)
    with LedgerReader(file) as reader:
        yield reader


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"a0.0", "a0.1", "b0.0", "b0.1", "a1.0", "a1.1", "mixed0.0", "odd_10.0"}),
        ({"state": "trained"}, {"a0.0", "a0.1", "b0.0", "b0.1"}),
        ({"step": 2}, {"b0.0", "b0.1"}),
        ({"outcome": "wrong"}, {"a0.1", "b0.1"}),
        ({"outcome": "ungraded"}, {"odd_10.0"}),
        ({"min_reward": 0.0}, {"a0.0", "b0.0"}),
        ({"max_reward": 0.0}, {"a0.1", "b0.1"}),
        ({"min_tokens": 5}, {"a0.1", "b0.1", "a1.1", "mixed0.0"}),
        ({"max_tokens": 4}, {"a0.0", "b0.0", "a1.0", "odd_10.0"}),
        ({"version": 3}, {"mixed0.0", "odd_10.0"}),
        ({"version": 2}, {"a1.0", "a1.1", "mixed0.0"}),
        ({"prompt_id": "a"}, {"a0.0", "a0.1", "a1.0", "a1.1"}),
        ({"prompt_id": "odd_1"}, {"odd_10.0"}),
        ({"prompt_id": "%i%"}, {"mixed0.0"}),
        ({"prompt_id": "od__1"}, set()),
        ({"prompt_id": "odd_%"}, {"odd_10.0"}),
        ({"prompt_id": "od__%"}, set()),  # an underscore stands for itself
        ({"prompt_id": "O%"}, set()),
        ({"prompt_id": "odd*"}, set()),
        ({"prompt_id": "[o]dd%"}, set()),
        ({"prompt_id": "a", "epoch": 1}, {"a1.0", "a1.1"}),
        ({"prompt_id": "a", "step": 2}, set()),
        ({"domain": "math", "step": 2}, {"b0.0", "b0.1"}),
        ({"domain": "code"}, set()),
    ],
)
def test_filters(reader, chosen, expected):
    rows = reader.response_rows(GroupFilter(**chosen))
    assert {f"{row.prompt_id}{row.epoch}.{row.response_index}" for row in rows} == expected


def test_lines_of_groups(reader):
    rows = {(row.prompt_id, row.epoch): row for row in reader.group_rows(GroupFilter())}
    assert len(rows) == 6
    trained = rows["a", 0]
    assert (trained.state, trained.step, trained.finished, trained.num_responses) == ("trained", 1, 2, 2)
    assert (trained.correct, trained.reward, trained.tokens) == (1, 0.0, 4.5)
    unfinished, empty = rows["mixed", 0], rows["b", 1]
    assert (unfinished.finished, unfinished.oldest_version, unfinished.newest_version) == (0, 2, 3)
    assert (empty.finished, empty.reward, empty.tokens, empty.oldest_version) == (0, None, None, None)
    assert rows["odd_1", 0].reward is None, "ungraded is not zero"
    newest = [row.group_id for row in reader.group_rows(GroupFilter(), limit=2)]
    assert newest == sorted((row.group_id for row in rows.values()), reverse=True)[:2]


def test_a_history_that_contradicts_the_state_is_found(reader, ledger):
    assert reader.trained_not_once() == []
    [group] = ledger.connection.execute("SELECT group_id FROM groups WHERE prompt_id = 'a' AND epoch = 0").fetchone()
    ledger.note("trained", [group], step=9)
    assert reader.trained_not_once() == [(0, "a", "trained", 2)]


def test_responses_of_the_newest_groups_first(reader):
    rows = list(reader.response_rows(GroupFilter(), 3, newest_first=True))
    assert [(row.prompt_id, row.epoch, row.response_index) for row in rows] == [
        ("odd_1", 0, 0), ("mixed", 0, 0), ("a", 1, 0),
    ]  # fmt: skip
    everything = [(row.group_id, row.response_index) for row in reader.response_rows(GroupFilter())]
    assert everything == sorted(everything)


def test_characters_that_mean_something_to_the_database_stand_for_themselves(ledger, file, advance):
    names = ["a*b", "a?b", "a[b]c", "axb"]
    for name in names:
        advance(ledger, name, "generated")
    with LedgerReader(file) as reader:
        for name in names:
            assert [row.prompt_id for row in reader.group_rows(GroupFilter(prompt_id=name))] == [name]
        assert [row.prompt_id for row in reader.group_rows(GroupFilter(prompt_id="a[%"))] == ["a[b]c"]


def test_what_was_noted_of_several_groups_in_one_go_is_one_line(reader, ledger):
    ids = [row.group_id for row in reader.group_rows(GroupFilter(step=1))]
    ledger.note("rolled back", [*ids, 2], detail="resumed from step 0")
    newest = reader.event_rows(limit=1)[0]
    assert (newest.event, newest.groups, newest.prompt_id, newest.detail) == (
        "rolled back", 2, None, "resumed from step 0",
    )  # fmt: skip
    [of_a, trained] = reader.event_rows(prompt_id="a")
    assert (of_a.event, of_a.groups, of_a.prompt_id, of_a.epoch) == ("rolled back", 1, "a", 0)
    assert (trained.event, trained.step) == ("trained", 1)
    assert [row.step for row in reader.event_rows(event="trained")] == [2, 1], "newest first"
    assert reader.steps("trained") == [1, 2]
    assert reader.steps("committed") == []
