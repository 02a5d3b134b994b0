"""A server may start in the engines' turn only, and the trainer waits for one that does."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_klear.session.turn import Turn


def test_a_start_waits_for_the_engines_turn_and_the_trainer_for_the_start() -> None:
    turn, started, may_end = Turn(), threading.Event(), threading.Event()

    def start() -> None:
        with turn.starting(lambda: None):
            started.set()
            may_end.wait(10.0)

    starting = threading.Thread(target=start)
    starting.start()
    assert not started.wait(0.4), "the trainer has the memory at first"
    turn.give()
    assert started.wait(10.0)
    waits: list[int] = []

    def waiting() -> None:
        waits.append(1)
        may_end.set()

    turn.take(waiting)
    assert waits, "it did not wait for the server that was starting"
    starting.join(10.0)
    turn.take(lambda: None)  # it is its turn already


def test_who_cannot_wait_has_a_start_given_up() -> None:
    turn, started = Turn(), threading.Event()
    turn.give()
    asked: list[bool] = []

    def start() -> None:
        with turn.starting(lambda: None):
            started.set()
            while not turn.is_urgent:
                time.sleep(0.01)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    assert started.wait(10.0)

    def is_urgent() -> bool:
        asked.append(turn.is_urgent)
        return len(asked) > 2  # the signal comes while it waits

    turn.take(lambda: None, is_urgent)
    assert asked[:3] == [False] * 3
    starting.join(10.0)
    assert not turn.is_urgent, "the next start is not concerned"


def test_what_waits_can_be_given_up() -> None:
    turn = Turn()

    def given_up() -> None:
        raise InterruptedError("the run is ending")

    with pytest.raises(InterruptedError), turn.starting(given_up):
        pytest.fail("started in the trainer's turn")
    turn.give()
    with turn.starting(lambda: None), pytest.raises(InterruptedError):
        turn.take(given_up)
    turn.take(lambda: pytest.fail("nothing starts any more"))
