"""Both walks over the data visit every row once per epoch, in any layout, and go on from any place."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data import BinSteps, DataCursor, SequenceSteps, Steps
from megatron_klear.errors import DataError
from megatron_klear.packing import plan_bins

LENGTHS = np.random.default_rng(0).integers(1, 90, size=97)


def by_sequences(batch: int = 12) -> SequenceSteps:
    return SequenceSteps(DataCursor(len(LENGTHS), batch, seed=3, fingerprint="f"), epochs=3)


def by_bins(batch: int = 4, budget: int = 128, seed: int = 3) -> BinSteps:
    return BinSteps(LENGTHS, batch_bins=batch, token_budget=budget, multiple=32, share=0.01, seed=seed, fingerprint="f")


@pytest.mark.parametrize("make", [by_sequences, by_bins])
def test_every_row_once_per_epoch_over_a_resume(make: Callable[[], Steps]) -> None:
    walk = make()
    total = walk.steps_for_epochs(3)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(total):
        if number % 5 == 2:  # killed here, and the place is stored as JSON
            state = json.loads(json.dumps(walk.state_dict()))
            walk = make()
            walk.load_state(state)
        plan = walk.next_step()
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        seen.update(zip(plan.epochs.tolist(), plan.rows.tolist(), strict=True))
    assert seen == Counter({(epoch, row): 1 for epoch in range(3) for row in range(len(LENGTHS))})
    assert walk.steps_for_epochs(3) == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_run_of_sequences_ends_with_its_epochs_and_its_last_step_is_no_scrap(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), "rows")
    batch = data.draw(st.integers(1, rows), "batch")
    epochs = data.draw(st.integers(1, 4), "epochs")
    walk = SequenceSteps(DataCursor(rows, batch, seed=1), epochs)
    total = walk.steps_for_epochs(epochs)
    sizes, seen = [], Counter[tuple[int, int]]()
    for number in range(total):
        assert walk.steps_for_epochs(epochs) == total - number, "counted from the place"
        plan = walk.next_step()
        assert len(set(plan.rows.tolist())) == len(plan.rows)
        sizes.append(len(plan.rows))
        seen.update(zip(plan.epochs.tolist(), plan.rows.tolist(), strict=True))
    assert seen == Counter({(epoch, row): 1 for epoch in range(epochs) for row in range(rows)})
    assert sizes[:-1] == [batch] * (total - 1)
    assert sizes[-1] < 1.5 * batch
    # A scrap is left only where joining it would have held a row twice.
    assert 2 * sizes[-1] >= batch or sizes[-1] + batch > rows


def test_a_run_goes_on_after_its_epochs_when_more_are_asked_for() -> None:
    walk = SequenceSteps(DataCursor(90, 12, seed=1), epochs=1)
    assert [len(walk.next_step().rows) for _ in range(walk.steps_for_epochs(1))] == [12] * 7 + [6]
    longer = SequenceSteps(DataCursor(90, 12, seed=1), epochs=2)
    assert longer.steps_for_epochs(2) == 15, "of a run that has both epochs from its start"
    longer.load_state(walk.state_dict())
    assert [len(longer.next_step().rows) for _ in range(longer.steps_for_epochs(2))] == [12] * 7 + [6]
    assert longer.state_dict()["position"] == 90
    assert len(longer.next_step().rows) == 12, "and has no end of its own beyond"


def test_what_the_steps_are_is_told() -> None:
    cursor = DataCursor(90, 12, seed=1)
    assert SequenceSteps(cursor).described() == "steps of 12 sequences"
    assert SequenceSteps(cursor, epochs=1).described() == "steps of 12 sequences, the last one of 6"
    assert SequenceSteps(cursor, epochs=2).described() == "steps of 12 sequences"
    assert SequenceSteps(DataCursor(97, 12, seed=1), 1).described() == "steps of 12 sequences, the last one of 13"
    walk = by_bins(batch=5)
    steps = [walk.next_step() for _ in range(walk.steps_for_epochs(1))]
    bins = plan_bins(LENGTHS, token_budget=128, bins_per_step=5, multiple=32, share=0.01, seeds=(3, 0)).num_bins
    assert bins % 5, "else the next line shows nothing"
    last = bins - 5 * (len(steps) - 1)
    assert walk.described() == f"an epoch in {len(steps)} steps of 5 bins, the last one of {last}"
    assert by_bins(batch=bins).described() == f"an epoch in 1 steps of {bins} bins"


@pytest.mark.parametrize("batch", range(1, 60))
def test_no_step_of_bins_is_a_scrap(batch: int) -> None:
    plan = plan_bins(LENGTHS, token_budget=128, bins_per_step=batch, multiple=32, share=0.01, seeds=(3, 0))
    sizes = [len(plan.step(number)) for number in range(plan.num_steps)]
    assert sum(sizes) == plan.num_bins == len(plan.starts) - 1
    assert sizes[:-1] == [batch] * (plan.num_steps - 1)
    assert sizes[-1] < 1.5 * batch
    assert 2 * sizes[-1] >= batch or plan.num_steps == 1


def test_copies_of_a_walk_share_its_plan_and_not_its_place() -> None:
    walk = by_bins()
    walk.next_step()
    other = copy.deepcopy(walk)
    assert other._plan() is walk._plan()
    assert other._lengths is LENGTHS
    wanted = [other.next_step().rows.tolist() for _ in range(3)]
    assert [walk.next_step().rows.tolist() for _ in range(3)] == wanted


def test_a_checkpoint_whose_epochs_had_a_step_more_is_refused() -> None:
    """As saved when the last bins of an epoch were always a step of their own, and the state did not count steps."""
    differ = set()
    for batch in range(2, 20):
        walk = by_bins(batch=batch)
        state = {k: v for k, v in walk.state_dict().items() if k != "steps_per_epoch"}
        alone = -(-walk._plan().num_bins // batch)
        differ.add(alone != walk.steps_for_epochs(1))
        if alone == walk.steps_for_epochs(1):
            walk.load_state(state)
        else:
            with pytest.raises(
                DataError, match=f"its epochs are {alone} steps by the version .* and {alone - 1} by this"
            ):
                walk.load_state(state)
    assert differ == {True, False}


def test_resumed_steps_are_those_that_were_left() -> None:
    for make in (by_sequences, by_bins):
        through, first = make(), make()
        for _ in range(11):
            first.next_step()
            through.next_step()
        second = make()
        second.load_state(first.state_dict())
        for _ in range(40):
            one, other = through.next_step(), second.next_step()
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.epochs, other.epochs)
            assert one.bins == other.bins


def test_bins_hold_the_rows_of_the_step_and_the_last_step_is_packed_by_itself() -> None:
    walk = by_bins()
    steps = [walk.next_step() for _ in range(walk.steps_for_epochs(1))]
    for plan in steps[:-1]:
        assert plan.bins is not None
        assert len(plan.bins) == 4
        assert [position for members in plan.bins for position in members] == list(range(len(plan.rows)))
        for members in plan.bins:
            assert (-(-LENGTHS[plan.rows[members]] // 32) * 32).sum() <= 128
    assert steps[-1].bins is None


def test_a_place_in_another_plan_is_refused_naming_the_settings() -> None:
    state = by_bins().state_dict()
    with pytest.raises(DataError) as caught:
        by_bins(batch=8, budget=256, seed=4).load_state(state)
    for text in ("sft.batch_bins was 4 and is 8", "packing.token_budget was 128 and is 256", "run.seed was 3 and is 4"):
        assert text in str(caught.value)
    with pytest.raises(DataError, match=r"sft\.batch_bins was null and is 4"):
        by_bins().load_state(by_sequences().state_dict())
    with pytest.raises(DataError, match=r"sft\.batch_bins was 4 and is null"):
        by_sequences().load_state(state)
