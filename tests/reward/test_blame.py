"""The limit by the clock on a busy machine: what others take of a test's time changes no grade, what it sleeps does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil
import pytest

from megatron_klear.records import Grade
from megatron_klear.reward import CodeGraderPool, Limits
from megatron_klear.reward.code_tests import parse_problem
from megatron_klear.reward.sandbox import SandboxMode, SandboxProcess, blame, process
from tests.reward.conftest import prints, program

HOGS = 12
ENDLESS = "while True: pass"
COMPUTES = "import time\nwhile time.process_time() < 0.6: pass\nprint(1)"
SLEEPS = "import time\ntime.sleep(1000)"
# Wakes up often, so that it is ready to run at any moment that it might be looked at, and uses next to no time.
NAPS = "import time\nwhile True: time.sleep(0.001)"
STOPS = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"


@contextmanager
def other_work(pool: CodeGraderPool) -> Iterator[None]:
    """Keep one processor busy, the only one that the pool's sandboxes may use: a 13th of it is left to them."""
    processor = min(os.sched_getaffinity(0))
    assert pool.grade_many([("first", program("print(1)"), prints("1"))])[0].outcome == "correct"
    for pid in pool.worker_pids():
        for part in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):  # of the answer just graded
                part.cpu_affinity([processor])
    spin = f"import os\nos.sched_setaffinity(0, [{processor}])\nprint(flush=True)\nwhile True: pass"
    # Each in a session of its own: a kernel may share a processor between sessions first.
    hogs = [
        subprocess.Popen([sys.executable, "-S", "-c", spin], stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(HOGS)
    ]
    try:
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()


def graded(pool: CodeGraderPool, code: str) -> Grade:
    return pool.grade_many([("a", program(code), prints("1"))])[0]


@pytest.mark.parametrize("mode", ["bubblewrap", "rlimits"])
def test_time_that_others_take_is_not_the_answers(bubblewrap: str, mode: SandboxMode) -> None:
    limits = Limits(cpu_seconds=5.0, wall_seconds=2.0)
    with CodeGraderPool(workers=1, sandbox=mode, limits=limits) as pool, other_work(pool):
        began = time.monotonic()
        grade = graded(pool, COMPUTES)
        assert time.monotonic() - began > limits.wall_seconds, "the machine was not busy"
        assert (grade.outcome, grade.reason) == ("correct", "passed all 1 tests")


def test_without_any_time_there_is_no_grade_and_the_sandbox_goes_on(bubblewrap: str) -> None:
    with CodeGraderPool(workers=1, limits=Limits(cpu_seconds=1.0, wall_seconds=2.0)) as pool:
        with other_work(pool):
            workers = pool.worker_pids()
            grade = graded(pool, ENDLESS)
        assert grade.outcome == "ungraded"
        assert "no verdict within 10 s by the clock: at most 1 s of CPU time" in grade.reason
        assert "the machine was busy with other work (code_reward.cpu_seconds)" in grade.reason
        assert graded(pool, "print(1)").outcome == "correct"
        assert pool.worker_pids() == workers


@pytest.mark.parametrize("code", [SLEEPS, STOPS, NAPS], ids=["sleeps", "stops", "naps"])
def test_an_answer_that_wastes_its_time_is_wrong(bubblewrap: str, code: str) -> None:
    # On a busy machine what naps is ready to run most of the time: fifty times the limit by the clock is much to wait.
    with CodeGraderPool(workers=1, limits=Limits(cpu_seconds=5.0, wall_seconds=1.0)) as pool:
        grade = graded(pool, code)
    assert grade.outcome == "wrong"
    assert "time limit: more than 1 s by the clock" in grade.reason


@pytest.mark.parametrize("code", [SLEEPS, STOPS], ids=["sleeps", "stops"])
def test_also_where_the_machine_is_busy(bubblewrap: str, code: str) -> None:
    limits = Limits(cpu_seconds=2.0, wall_seconds=2.0)
    with CodeGraderPool(workers=1, limits=limits) as pool, other_work(pool):
        began = time.monotonic()
        grade = graded(pool, code)
        assert time.monotonic() - began < limits.patience_seconds
    assert grade.outcome == "wrong"
    assert "time limit: more than 2 s by the clock" in grade.reason


def test_a_test_that_is_ended_before_it_was_read_leaves_nothing_for_the_next(
    bubblewrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the kind assert comes in a message that its own process is to read."""
    problem = parse_problem(json.dumps({"kind": "assert", "tests": ["assert f() == 1"]}))
    [message] = problem.messages()
    sandbox = SandboxProcess()
    try:
        sandbox.wait_ready()
        assert sandbox.open(problem.sources("def f(): return 1"), Limits()) == ""
        monkeypatch.setattr(blame, "_counts", lambda threads: False)  # at the limit by the clock it is over
        monkeypatch.setattr(process, "_LOOK_SECONDS", 0.0)
        ended = 0
        for _ in range(20):
            with monkeypatch.context() as short:
                short.setattr(sandbox, "_limits", replace(Limits(), wall_seconds=0.0))
                ended += "by the clock" in sandbox.run(message).problem  # unless it was quicker
            result = sandbox.run(message)
            assert (result.problem, problem.judge(0, result.output)) == ("", "")
        assert ended > 0
    finally:
        sandbox.discard()


def test_processes_that_a_test_starts_earn_it_no_more_time(bubblewrap: str) -> None:
    """They keep the machine busy themselves, and one that nobody waits for hides what it has used."""
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "while True:\n    for _ in range(8):\n        if os.fork() == 0:\n"
        "            while time.process_time() < 0.1: pass\n            os._exit(0)\n    time.sleep(0.2)"
    )
    with CodeGraderPool(workers=1, limits=Limits(cpu_seconds=1.0, wall_seconds=1.0, allow_processes=True)) as pool:
        grade = graded(pool, code)
    assert grade.outcome == "wrong"


def test_a_kernel_that_counts_no_waiting_leaves_the_clock_as_it_was(
    bubblewrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "_counts", lambda threads: False)
    limits = Limits(cpu_seconds=3.0, wall_seconds=1.0)
    with CodeGraderPool(workers=1, limits=limits) as pool, other_work(pool):
        assert "more than 1 s by the clock" in graded(pool, ENDLESS).reason
