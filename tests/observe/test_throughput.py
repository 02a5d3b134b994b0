"""Phase timers, against a clock set by hand."""

from __future__ import annotations

import pytest

from megatron_klear.observe.throughput import Phases


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_start_again() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    for seconds in (2.0, 3.0):
        with phases.time("generate"):
            clock.now += seconds
        clock.now += 100.0
    with phases.time("grade"):
        clock.now += 0.5
    assert phases.take() == {"generate": 5.0, "grade": 0.5}
    assert phases.take() == {}


def test_an_inner_phase_stops_the_outer_clock() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    with phases.time("train"):
        clock.now += 1.0
        with phases.time("optimizer"):
            clock.now += 4.0
            with phases.time("optimizer"):
                clock.now += 8.0
        clock.now += 2.0
    assert phases.take() == {"train": 3.0, "optimizer": 12.0}


def test_time_before_an_exception_counts() -> None:
    clock = Clock()
    phases = Phases(clock=clock)

    def fail_after(seconds: float) -> None:
        clock.now += seconds
        raise KeyError

    with pytest.raises(KeyError), phases.time("train"):
        fail_after(1.5)
    with phases.time("save"):
        clock.now += 1.0
    assert phases.take() == {"train": 1.5, "save": 1.0}


def test_taking_inside_a_phase_splits_it() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    with phases.time("train"):
        clock.now += 1.0
        assert phases.take() == {"train": 1.0}
        clock.now += 2.0
    assert phases.take() == {"train": 2.0}


def test_synchronize_is_called_at_both_ends() -> None:
    calls: list[str] = []
    phases = Phases(synchronize=lambda: calls.append("sync"))
    with phases.time("train"):
        calls.append("work")
    assert calls == ["sync", "work", "sync"]
