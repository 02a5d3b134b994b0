"""What the soak asks a ledger finds what is trained twice, never, or not in its turn."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.soak_ledger import NOT_ONCE, TIMES, is_whole, walk_of_ledger
from megatron_klear.data import DataCursor
from megatron_klear.records import Prompt
from megatron_klear.rollout.ledger import Ledger

ROWS, PER_STEP, STEPS, AHEAD = 21, 4, 12, 2
"""Steps of four cross the borders of epochs of 21: some batches defer rows."""


@pytest.fixture
def trained(tmp_path: Path, make_prompt: Callable[[str], Prompt]) -> Path:
    """A ledger after 12 steps, with two more reserved."""
    cursor = DataCursor(ROWS, PER_STEP, seed=5)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for step in range(1, STEPS + AHEAD + 1):
            rows, epochs = cursor.next_batch_and_epochs()
            keyed = [(int(e), make_prompt(f"p{row}")) for row, e in zip(rows, epochs, strict=True)]
            ids = ledger.reserve(keyed, num_responses=1)
            if step <= STEPS:
                with ledger.transaction() as db:
                    for place, group_id in enumerate(ids):
                        db.execute(
                            "UPDATE groups SET state = 'committed', step = ?, place = ? WHERE group_id = ?",
                            [step, place, group_id],
                        )
                ledger.trained(step)
    return tmp_path / "ledger.sqlite"


def asked(file: Path) -> dict[str, object]:
    ids = [f"p{row}" for row in range(ROWS)]
    return walk_of_ledger(file, ids, seed=5, per_step=PER_STEP, most_in_flight=AHEAD * PER_STEP)


def change(file: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(file) as database:
        return database.execute(query).fetchall()


def test_a_prefix_of_the_walk_is_whole(trained: Path) -> None:
    told = asked(trained)
    assert is_whole(told), told
    assert told["in_flight"] == AHEAD * PER_STEP
    assert change(trained, NOT_ONCE) == []
    assert change(trained, TIMES) == [(1, STEPS * PER_STEP)]


def test_a_prompt_that_was_never_reserved_is_skipped(trained: Path) -> None:
    [key] = change(trained, "SELECT epoch, prompt_id FROM groups WHERE group_id = 23")
    change(trained, "DELETE FROM groups WHERE group_id = 23")
    told = asked(trained)
    assert told["skipped"] == [key]
    assert not is_whole(told)


def test_a_prompt_that_is_reserved_for_ever_is_left_behind(trained: Path) -> None:
    [key] = change(trained, "SELECT epoch, prompt_id FROM groups WHERE group_id = 9")
    change(trained, "UPDATE groups SET state = 'reserved', step = NULL, place = NULL WHERE group_id = 9")
    told = asked(trained)
    assert told["left_behind"] == [key]
    assert not is_whole(told)


def test_more_in_flight_than_may_be_is_not_whole(trained: Path) -> None:
    change(trained, f"UPDATE groups SET state = 'reserved', step = NULL, place = NULL WHERE step = {STEPS}")
    assert not is_whole(asked(trained))


def test_a_group_of_other_data_is_none_of_the_walk(trained: Path) -> None:
    change(trained, "UPDATE groups SET prompt_id = 'other' WHERE group_id = 30")
    told = asked(trained)
    assert told["not_of_the_walk"] == [(1, "other")]
    assert len(told["skipped"]) == 1  # type: ignore[arg-type]


def test_a_trained_group_without_a_history_is_seen(trained: Path) -> None:
    change(trained, "DELETE FROM events WHERE group_id = 12")
    assert [times for _, _, times in change(trained, NOT_ONCE)] == [0]
    assert dict(change(trained, TIMES)) == {0: 1, 1: STEPS * PER_STEP - 1}
