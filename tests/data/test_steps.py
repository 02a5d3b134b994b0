"""Both walks over the data visit every row once per epoch, in any layout, and go on from any place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megatron_klear.data import BinSteps, DataCursor, SequenceSteps, Steps
from megatron_klear.errors import DataError

LENGTHS = np.random.default_rng(0).integers(1, 90, size=97)


def by_sequences(batch: int = 12) -> SequenceSteps:
    return SequenceSteps(DataCursor(len(LENGTHS), batch, seed=3, fingerprint="f"))


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
    for epoch in range(3):
        assert [seen[epoch, row] for row in range(len(LENGTHS))] == [1] * len(LENGTHS)
    if make is by_bins:
        assert max(epoch for epoch, _ in seen) == 2, "epochs are whole"


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
