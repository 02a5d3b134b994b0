"""One run per directory, and no lock outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
