"""A helper process does not outlive the process that started it, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(600)
"""

CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("orphans", {file!r})  # without the room, whose torch takes seconds
orphans = importlib.util.module_from_spec(spec)
spec.loader.exec_module(orphans)
orphans.end_with_parent()
print("watching", flush=True)
time.sleep(600)
"""


def test_it_ends_when_its_parent_is_killed() -> None:
    file = Path(__file__).parents[2] / "megatron_klear" / "parallel" / "orphans.py"
    command = [sys.executable, "-c", PARENT, CHILD.format(file=str(file))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, word = parent.stdout.readline().split()
        assert word == "watching"
        time.sleep(1.5)
        os.kill(int(pid), 0)  # it lives as long as its parent does
        parent.kill()
    deadline = time.monotonic() + 30
    while _is_running(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
