"""The walk over a data set: every row once per epoch, resumable anywhere, the same whatever the batch size."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data import DataCursor
from megatron_klear.errors import DataError


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 30), batch=st.integers(1, 30), batches=st.integers(1, 25), seed=st.integers(0, 5))
def test_every_epoch_visits_every_row_once_and_no_batch_holds_a_row_twice(
    rows: int, batch: int, batches: int, seed: int
) -> None:
    batch = min(batch, rows)
    cursor = DataCursor(rows, batch, seed=seed)
    taken: list[int] = []
    for _ in range(batches):
        got = cursor.next_batch().tolist()
        assert len(got) == len(set(got)) == batch
        taken += got
        assert cursor.rows_taken == len(taken)
    counts = Counter(taken)
    # Deferring moves a row by less than a batch, so at any time visits differ by at most one between rows but for
    # rows that wait to be first in the next batch.
    waiting = cursor.state_dict()["deferred"]
    for row in waiting:
        counts[row] += 1
    visits = [counts[row] for row in range(rows)]
    assert max(visits) - min(visits) <= 1


def test_epochs_have_different_orders_that_depend_on_seed_and_epoch_alone() -> None:
    orders = {}
    for seed in (0, 1):
        cursor = DataCursor(50, 50, seed=seed)
        orders[seed] = [cursor.next_batch().tolist() for _ in range(3)]
    flat = [tuple(order) for per_seed in orders.values() for order in per_seed]
    assert len(set(flat)) == 6
    assert all(sorted(order) == list(range(50)) for order in flat)
    smaller = DataCursor(50, 10, seed=1)
    assert np.concatenate([smaller.next_batch() for _ in range(5)]).tolist() == orders[1][0]


def test_the_order_is_pinned_so_that_runs_resume_under_other_versions_of_numpy() -> None:
    assert DataCursor(8, 8, seed=7).next_batch().tolist() == [4, 3, 6, 2, 1, 0, 5, 7]


def test_orders_are_uniform_over_permutations() -> None:
    counts = Counter(tuple(DataCursor(3, 3, seed=seed).next_batch().tolist()) for seed in range(1200))
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom exceeds 25.7 in one of ten thousand.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 25.7


@pytest.mark.parametrize("stop_after", range(9))
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_walk_goes_on_exactly_where_its_state_says(stop_after: int, shuffle: bool) -> None:
    through = DataCursor(7, 4, seed=3, shuffle=shuffle, fingerprint="f")
    batches = [through.next_batch().tolist() for _ in range(12)]
    first = DataCursor(7, 4, seed=3, shuffle=shuffle, fingerprint="f")
    for _ in range(stop_after):
        first.next_batch()
    saved = json.loads(json.dumps(first.state_dict()))
    second = DataCursor(7, 4, seed=3, shuffle=shuffle, fingerprint="f")
    second.load_state(saved)
    assert [second.next_batch().tolist() for _ in range(12 - stop_after)] == batches[stop_after:]


def test_a_state_does_not_change_when_the_walk_goes_on() -> None:
    cursor = DataCursor(5, 4, seed=0)
    cursor.next_batch()
    cursor.next_batch()
    state = cursor.state_dict()
    kept = json.dumps(state)
    for _ in range(5):
        cursor.next_batch()
    assert json.dumps(state) == kept


def test_another_batch_size_may_take_over_without_losing_rows() -> None:
    large = DataCursor(9, 7, seed=2)
    taken = large.next_batch().tolist() + large.next_batch().tolist()
    small = DataCursor(9, 1, seed=2)
    small.load_state(large.state_dict())
    taken += [int(small.next_batch()[0]) for _ in range(4)]
    assert Counter(taken) == dict.fromkeys(range(9), 2)


def test_without_shuffling_rows_come_in_file_order() -> None:
    cursor = DataCursor(5, 3, seed=0, shuffle=False)
    assert cursor.next_batch().tolist() == [0, 1, 2]
    assert cursor.next_batch().tolist() == [3, 4, 0]
    assert cursor.next_batch().tolist() == [1, 2, 3]
    assert cursor.epoch == 1
    assert cursor.epochs_done == pytest.approx(9 / 5)


def test_a_row_that_is_already_in_a_crossing_batch_comes_first_in_the_next() -> None:
    cursor = DataCursor(3, 3, seed=0, shuffle=False)
    cursor.load_state({**cursor.state_dict(), "position": 1})
    # 1 and 2 end the epoch and 0 begins the next, whose 1 and 2 follow.
    assert cursor.next_batch().tolist() == [1, 2, 0]
    assert cursor.next_batch().tolist() == [1, 2, 0]
    cursor.load_state({**cursor.state_dict(), "epoch": 1, "position": 0, "deferred": [2]})
    # 2 waits from the epoch before; 0 and 1 fill the batch, the new epoch's own 2 comes next.
    assert cursor.next_batch().tolist() == [2, 0, 1]
    assert cursor.next_batch().tolist() == [2, 0, 1]
    shuffled = DataCursor(6, 4, seed=0)
    order = {epoch: shuffled._order_of(epoch).tolist() for epoch in (0, 1)}
    shuffled.next_batch()
    crossing, following = shuffled.next_batch().tolist(), shuffled.next_batch().tolist()
    left = order[0][4:]
    fresh = [row for row in order[1] if row not in left][:2]
    assert crossing == left + fresh
    passed_over = [row for row in order[1][: order[1].index(fresh[-1])] if row in left]
    assert following[: len(passed_over)] == passed_over
    assert sorted(fresh + following) == list(range(6))


def test_fewer_rows_than_a_batch_are_refused_naming_the_settings() -> None:
    with pytest.raises(DataError, match=r"data.prompts holds 5 usable rows, fewer than the 8 .*rl.prompts_per_step"):
        DataCursor(5, 8, seed=0, setting="data.prompts", batch_setting="rl.prompts_per_step")


def test_other_data_are_refused_at_resume_with_every_difference() -> None:
    state = DataCursor(10, 2, seed=0, fingerprint="a").state_dict()
    with pytest.raises(DataError, match=r"held 10 usable rows and holds 11.*run.seed was 0 and is 1"):
        DataCursor(11, 2, seed=1, fingerprint="b").load_state(state)
    with pytest.raises(DataError, match=r"the rows of data.sft are not the same"):
        DataCursor(10, 2, seed=0, fingerprint="b").load_state(state)
    with pytest.raises(DataError, match=r"data.shuffle was true and is false"):
        DataCursor(10, 2, seed=0, shuffle=False, fingerprint="a").load_state(state)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), batch=st.integers(1, 12), batches=st.integers(0, 12))
def test_what_is_still_to_come_is_what_was_not_given_out(rows: int, batch: int, batches: int) -> None:
    cursor = DataCursor(rows, min(batch, rows), seed=0)
    given_out: set[tuple[int, int]] = set()
    for _ in range(batches):
        taken, epochs = cursor.next_batch_and_epochs()
        given_out |= set(zip(epochs.tolist(), taken.tolist(), strict=True))
    places = {(epoch, row) for epoch in range(cursor.epoch + 3) for row in range(rows)}
    assert cursor.still_to_come(places) == places - given_out
