"""One run per directory, and no lock outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from megatron_klear.session import run_lock
from megatron_klear.session.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from megatron_klear.session.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(repr(lock.holder), flush=True)
input()
"""


def test_a_second_run_learns_who_holds_the_directory_until_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "''\n"
        assert RunLock(tmp_path).holder.startswith(f"process {first.pid} on ")
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert RunLock(tmp_path).holder == ""


def test_a_released_directory_is_free(tmp_path):
    lock = RunLock(tmp_path)
    assert RunLock(tmp_path).holder.startswith(f"process {os.getpid()} on ")
    lock.release()
    lock.release()
    assert RunLock(tmp_path).holder == ""


def test_a_holder_on_another_machine_is_waited_for(tmp_path, monkeypatch):
    """As after the death of a node, whose lease the file server has yet to end."""
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "node-that-died")
    dead = RunLock(tmp_path)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "node-that-took-over")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            dead.release()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    assert RunLock(tmp_path).holder == ""
    assert len(waits) == 3


def test_a_holder_on_another_machine_that_lives_on_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "busy-node")
    lock = RunLock(tmp_path)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "this-node")
    assert RunLock(tmp_path, lease_seconds=0.05).holder == f"process {os.getpid()} on busy-node"
    lock.release()
