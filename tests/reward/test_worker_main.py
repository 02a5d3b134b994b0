"""The worker process dies with its parent, also when it is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import sys, threading, time
sys.path[:] = {path!r}
from megatron_klear.reward import MathGraderPool
pool = MathGraderPool(workers=2, timeout_seconds=1000.0)
pool.grade_many([("a", "<think>t</think>\\\\boxed{{5}}", "5")])
while len(pool.worker_pids()) < 2:
    time.sleep(0.02)
assert "sympy" not in sys.modules and "torch" not in sys.modules
print(*pool.worker_pids(), flush=True)
{last}
"""
BUSY = 'pool.grade_many([("b", "<think>t</think>\\\\boxed{9^{9^9}}", "5")])'
IDLE = "time.sleep(1000)"
ENDS = f"threading.Thread(target=lambda: {BUSY}, daemon=True).start()"


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("last", "kill"), [(BUSY, True), (IDLE, True), (ENDS, False)], ids=["busy", "idle", "exit"])
def test_no_worker_outlives_its_parent(last: str, kill: bool) -> None:
    """`exit` is an interpreter that ends without closing the pool."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(path=sys.path, last=last)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        if kill:
            assert all(is_running(pid) for pid in pids)
            time.sleep(0.5)  # let the bomb begin
            os.kill(parent.pid, signal.SIGKILL)
        assert parent.wait(timeout=30.0) == (-signal.SIGKILL if kill else 0)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 10.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if is_running(pid)] == []
