"""Who is to blame for a test that has reached the limit by the clock: the answer, or a machine without time for it.

Seen from outside the sandbox, where /proc is. The kernel counts how long each thread was ready to run and had no
processor (schedstat): that time is the machine's. All other time is the answer's, whether it computes, sleeps, waits
for input or has stopped itself. A thread cannot wait for a processor unless others keep all of them busy; what a test's
own threads take from one another ends at its limit on CPU time.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

_PROC = "/proc"


class Thread(NamedTuple):
    """A thread at a moment.

    Attributes:
        state: the kernel's letter; R is running or ready to run.
        cpu_ns: processor time so far.
        waited_ns: time so far that it was ready and others ran, without the time since it was last put off.
    """

    state: str
    cpu_ns: int
    waited_ns: int


class Blame:
    """Looks at the processes of one sandbox while a test runs in it.

    Args:
        root_pid: of the sandbox's first process.
        depth: how many parents lie between a test's process and that one.
        standing: processes of the sandbox that were there before the test (`standing_processes`).
    """

    def __init__(self, root_pid: int, depth: int, standing: Iterable[int]) -> None:
        self._root_pid, self._depth = root_pid, depth
        self._earlier = {(pid, tid): thread.waited_ns for pid in standing for tid, thread in _threads(pid).items()}
        self._before: dict[tuple[int, int], Thread] | None = None

    def look(self) -> float | None:
        """Seconds that the test has lost to others so far; infinite while it, or the sandbox itself, gets no processor.

        None where nothing can be said yet, or by this kernel: ask again a little later, and once more in vain is never.
        """
        levels = _levels(self._root_pid)
        found = {
            (pid, tid): thread for level in levels for pid in level for tid, thread in _threads(pid).items()
        }  # fmt: skip
        before, self._before = self._before, found
        if before is None:
            return None
        tests = {pid for level in levels[self._depth :] for pid in level}
        if not _counts(found.values()):
            return None
        # What comes of a thread that is kept from running is not known before it runs: is anything getting on?
        held_up = {key for key, thread in found.items() if thread.state == "R" and before.get(key) == thread}
        gets_on = any(pid in tests and before.get((pid, tid)) != thread for (pid, tid), thread in found.items())
        if any(pid not in tests for pid, _ in held_up) or (held_up and not gets_on):
            return float("inf")
        longest: dict[int, int] = defaultdict(int)
        for (pid, _), thread in found.items():
            if pid in tests:
                longest[pid] = max(longest[pid], thread.waited_ns)
        # A test is begun and ended by the sandbox, whose waiting is not the answer's either.
        ours = sum(thread.waited_ns - self._earlier.get(key, 0) for key, thread in found.items() if key[0] not in tests)
        return (sum(longest.values()) + ours) / 1e9


def standing_processes(root_pid: int, depth: int) -> list[int]:
    """The processes of a sandbox in which no answer is open."""
    return [pid for level in _levels(root_pid)[:depth] for pid in level]


def _counts(threads: Iterable[Thread]) -> bool:
    """Whether this kernel counts processor time and waiting; one that does not says 0 for all."""
    return any(thread.cpu_ns for thread in threads)


def _levels(root_pid: int) -> list[list[int]]:
    """Process ids of a tree, by their distance from the root."""
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir(_PROC):
        if name.isdecimal():
            parent = _fields(f"{_PROC}/{name}/stat")[1:2]
            if parent:
                children[int(parent[0])].append(int(name))
    levels = [[root_pid]]
    while below := [child for pid in levels[-1] for child in children[pid]]:
        levels.append(below)
    return levels


def _threads(pid: int) -> dict[int, Thread]:
    """The threads of a process that has not ended meanwhile."""
    try:
        names = os.listdir(f"{_PROC}/{pid}/task")
    except OSError:
        return {}
    found = {}
    for name in names:
        folder = f"{_PROC}/{pid}/task/{name}"
        state, times = _fields(f"{folder}/stat")[:1], _fields(f"{folder}/schedstat", after="")[:2]
        if state and len(times) == 2:
            found[int(name)] = Thread(state[0], int(times[0]), int(times[1]))
    return found


def _fields(path: str, after: str = ")") -> list[str]:
    """The words of a file of /proc behind the last `after`: a program's name may hold spaces and brackets."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(after)[2].split() if after else file.read().split()
    except OSError:
        return []
