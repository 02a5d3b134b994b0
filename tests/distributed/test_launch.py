"""Launches that go wrong: the rank to blame is named, its words are shown, and no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_klear.conformance import launch as launching
from megatron_klear.conformance.launch import LaunchResult, run_layouts
from megatron_klear.conformance.matrix import Comparison, Layout

WORKER = Path(__file__).with_name("troubled_worker.py")
LAYOUTS = (Layout(), Layout(tp=2))


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks here that wait for one that failed do so for ever; no need to watch them for long."""
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.5)


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory where the ranks note their process ids."""
    monkeypatch.setenv("TROUBLE_PIDS", str(tmp_path))
    return tmp_path


def launch(trouble: str, timeout_seconds: float, seen: list[Comparison] | None = None) -> LaunchResult:
    on_row = None if seen is None else seen.append
    return run_layouts(
        LAYOUTS, 2, timeout_seconds=timeout_seconds, worker=(str(WORKER), trouble), on_row=on_row
    )  # fmt: skip


def assert_none_left(pids: Path) -> None:
    """All ranks were started, and have ended."""
    numbers = [int(file.read_text()) for file in pids.iterdir()]
    assert len(numbers) == 2
    assert not any(psutil.pid_exists(number) for number in numbers)


def test_rank_that_raises_is_named_with_its_message(pids: Path) -> None:
    seen: list[Comparison] = []
    result = launch("raise", 60, seen)
    assert result.failure is not None
    assert "rank 1 failed with exit status 1 in layout 'tp2 pp1 cp1 dp1 rl gppo budget 128'" in result.failure
    assert "RuntimeError: the sum is wrong" in result.failure
    assert "Did not report" not in result.failure  # rank 0 hangs for want of rank 1
    assert [row.label for row in result.rows] == ["a"]
    assert list(result.rows) == seen
    assert_none_left(pids)


def test_rank_that_is_killed_is_named(pids: Path) -> None:
    result = launch("killed", 60)
    assert result.failure is not None
    assert "rank 1 was ended by SIGKILL" in result.failure
    assert_none_left(pids)


def test_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(pids: Path) -> None:
    result = launch("hang", 8)
    assert result.failure is not None
    head, _, stacks = result.failure.partition("\n")
    assert head.startswith("not done after 8 s. Did not report: rank 1 (in layout 'tp2 ")
    assert "all_reduce" in stacks.split("Rank 1 is at:")[0]
    assert "troubled_worker.py" in stacks.split("Rank 1 is at:")[1]
    assert_none_left(pids)


def test_rank_that_does_not_answer_is_named(pids: Path) -> None:
    result = launch("deaf", 8)
    assert result.failure is not None
    assert "Did not report: ranks 0, 1" in result.failure
    assert result.failure.count("(it does not answer)") == 2
    assert_none_left(pids)


def test_failure_before_the_first_layout_says_so() -> None:
    result = launch("early", 60)
    assert result.failure is not None
    assert "failed with exit status 1 before its first layout" in result.failure
    assert "no such library" in result.failure
    assert result.rows == ()


def test_missing_comparisons_are_a_failure_even_when_all_ranks_end_well() -> None:
    result = launch("silent", 60)
    assert result.failure == "every rank ended well, but comparisons are missing: 1"
    assert len(result.rows) == 1


def test_ranks_end_when_the_process_that_started_them_is_killed(pids: Path) -> None:
    code = (
        "import sys; from megatron_klear.conformance.launch import run_layouts\n"
        "from megatron_klear.conformance.matrix import Layout\n"
        "run_layouts([Layout(), Layout(tp=2)], 2, timeout_seconds=50, worker=(sys.argv[1], 'hang'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(WORKER)], env=environment)
    try:
        deadline = time.monotonic() + 40
        while len(list(pids.iterdir())) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # both files are whole
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    numbers = [int(file.read_text()) for file in pids.iterdir()]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(number) for number in numbers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(number) for number in numbers)
