"""Grading by the workers of several machines: order, load, and machines that fail."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_klear.errors import RewardError, RolloutError
from megatron_klear.parallel import Machines
from megatron_klear.records import Grade
from megatron_klear.session.machine_graders import MachineGraders


class Pool:
    """As `MathGraderPool` with so many workers: right when the response is the reference, after some work."""

    def __init__(self, workers: int, work: Callable[[str], object] = lambda _: None) -> None:
        self._workers = threading.Semaphore(workers)
        self._work_on = work
        self.graded: list[str] = []
        self.closed = False

    def grade_many(self, requests: Sequence[Any]) -> list[Grade]:
        threads = [threading.Thread(target=self._work, args=(request[1],)) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [Grade(outcome="correct" if r[1] == r[2] else "wrong", reward=1.0, reason=r[0]) for r in requests]

    def _work(self, response: str) -> None:
        with self._workers:
            self._work_on(response)
            self.graded.append(response)

    def close(self) -> None:
        self.closed = True


class Launch:
    """Stands in for `Machines`: calls go to the pools, or fail."""

    def __init__(self, pools: list[Pool], failing: dict[int, Exception] | None = None) -> None:
        self.count, self.pools, self.failing = len(pools), pools, failing or {}
        self.calls: list[tuple[int, int]] = []

    def offer(self, name: str, action: Callable[..., Any]) -> None:
        assert name == "grade"

    def call(self, machine: int, name: str, requests: Sequence[Any], **limits: Any) -> list[Grade]:
        self.calls.append((machine, len(requests)))
        if machine in self.failing and len([m for m, _ in self.calls if m == machine]) > 1:
            raise self.failing[machine]
        return self.pools[machine].grade_many(requests)


def requests(count: int) -> list[tuple[str, str, str]]:
    return [(f"r{i}", str(i), str(i if i % 3 else -1)) for i in range(count)]


def graders(launch: Any, workers: int = 4) -> MachineGraders:
    return MachineGraders(launch, launch.pools[0], workers=workers)


def right(grades: Sequence[Grade], count: int) -> bool:
    return [(g.reason, g.outcome) for g in grades] == [(f"r{i}", "correct" if i % 3 else "wrong") for i in range(count)]


def test_all_machines_work_at_once_and_grades_come_in_order() -> None:
    pools = [Pool(4, lambda _: time.sleep(0.02)) for _ in range(3)]
    launch = Launch(pools)
    grades = graders(launch).grade_many(requests(200))
    assert right(grades, 200)
    assert sorted(int(r) for pool in pools for r in pool.graded) == list(range(200))
    assert min(len(pool.graded) for pool in pools) > 30


def test_a_slow_response_holds_up_no_others() -> None:
    """It takes until all others are graded, which the other machine and the other workers have to do."""
    pools: list[Pool] = []
    others_done: list[bool] = []

    def work(response: str) -> None:
        deadline = time.monotonic() + 20.0
        while response == "0" and time.monotonic() < deadline and not others_done:
            if sum(len(pool.graded) for pool in pools) == 119:
                others_done.append(True)
            time.sleep(0.01)

    pools += [Pool(2, work) for _ in range(2)]
    assert right(graders(Launch(pools), workers=2).grade_many(requests(120)), 120)
    assert others_done


@pytest.mark.parametrize("error", [RolloutError("machine 1 did not grade: EOFError"), RewardError("no worker")])
def test_what_a_machine_leaves_goes_to_the_others(error: Exception) -> None:
    launch = Launch([Pool(4) for _ in range(2)], failing={1: error})
    assert right(graders(launch).grade_many(requests(64)), 64)


def test_no_machine_at_all_is_an_error() -> None:
    failing: dict[int, Exception] = {m: RewardError(f"no worker on {m}") for m in range(2)}
    launch = Launch([Pool(4) for _ in range(2)], failing=failing)
    with pytest.raises(
        RewardError, match=r"no machine can grade: machine 0: no worker on 0; machine 1: no worker on 1"
    ):
        graders(launch).grade_many(requests(64))


class Elsewhere(Launch):
    """Two machines, the calls of the second one over a real socket: it answers from this process."""

    def __init__(self, pools: list[Pool]) -> None:
        super().__init__(pools)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.second, self.first = Machines.__new__(Machines), Machines.__new__(Machines)
        for end in (self.first, self.second):
            end._key, end._actions, end._offered, end.number, end.address = b"k" * 32, {}, threading.Condition(), 1, "b"
        self.first._places = [("", 0), self._listener.getsockname()]
        self.second._listener = self._listener
        self.second.offer("grade", lambda requests, _: pools[1].grade_many(requests))
        threading.Thread(target=self.second._listen, args=(self._listener,), daemon=True).start()

    def offer(self, name: str, action: Callable[..., Any]) -> None:
        self.first.offer(name, action)

    def call(self, machine: int, name: str, requests: Sequence[Any], **limits: Any) -> list[Grade]:
        self.calls.append((machine, len(requests)))
        found: list[Grade] = self.first.call(machine, name, requests, **limits)
        return found

    def close(self) -> None:
        self.second.close()


@pytest.fixture
def hung() -> Iterator[Callable[..., Elsewhere]]:
    """Two machines, of which the second takes every response and grades none."""
    may_end, made = threading.Event(), []

    def make() -> Elsewhere:
        made.append(Elsewhere([Pool(4), Pool(4, lambda _: may_end.wait(60.0))]))
        return made[0]

    yield make
    may_end.set()
    made[0].close()


def test_a_machine_that_never_answers_is_named_and_the_others_grade_its_responses(
    hung: Callable[[], Elsewhere], caplog: pytest.LogCaptureFixture
) -> None:
    launch: Any = hung()
    made = MachineGraders(launch, launch.pools[0], workers=4, limit_seconds=1.5)
    began = time.monotonic()
    assert right(made.grade_many(requests(64)), 64)
    assert 1.5 <= time.monotonic() - began < 15.0
    told = "machine 1 (127.0.0.1) did not grade: TimeoutError: it took the call and gave no answer within 1.5 s"
    assert f"{told}; it is not asked again in this run (reward.machine_seconds = 1.5)" in caplog.text
    launch.calls.clear()
    assert right(made.grade_many(requests(64)), 64)
    assert {machine for machine, _ in launch.calls} == {0}, "the run does not wait for it a second time"


def test_a_run_that_ends_does_not_wait_for_a_machine_that_never_answers(hung: Callable[[], Elsewhere]) -> None:
    launch: Any = hung()
    made = MachineGraders(launch, launch.pools[0], workers=4, limit_seconds=600.0)
    with ThreadPoolExecutor(1) as thread:
        grading = thread.submit(made.grade_many, requests(64))
        deadline = time.monotonic() + 20.0
        while len(launch.pools[0].graded) < 40 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not grading.done()
        began = time.monotonic()
        made.close()
        concurrent.futures.wait([grading], timeout=10.0)
    assert time.monotonic() - began < 5.0


def test_few_or_no_responses() -> None:
    launch = Launch([Pool(4) for _ in range(2)])
    made = graders(launch)
    assert made.grade_many([]) == []
    assert right(made.grade_many(requests(1)), 1)
    made.close()
    assert launch.pools[0].closed
