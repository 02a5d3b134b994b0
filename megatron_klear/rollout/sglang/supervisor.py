"""Runs one serving command and lets none of its processes outlive the trainer: `supervisor.py PID[,PID...] COMMAND...`.

A server makes processes of its own, and a trainer that is killed with SIGKILL ends none of them. So this small process
stands between the two. It notices that the trainer is gone by the end of its standard input, a pipe that only the
trainer holds, or by the signal that the kernel sends when its parent ends; every process below it, however it was
started, becomes its own child when left alone, and is killed.

Run as a file, with nothing but the standard library: it must start at once and stay small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 10.0
"""Time that the server has to end by itself after SIGTERM, when the trainer asks for it; SGLang looks every 5 s."""

_COMPANION = object()
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(parent_pid: int, companions: list[int], command: list[str]) -> int:
    """Run the command until it ends or the trainer is gone.

    Args:
        parent_pid: the trainer's process that started this one.
        companions: its other processes on this machine; the end of any of them is the trainer's.
        command: program and arguments.

    Returns:
        the command's exit status; 128 + number for a signal.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    # The trainer's thread that started this process may end before the trainer does, so that this signal alone says
    # little; with the check of the parent below it says enough.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    own_pid = os.getpid()
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _die_with_supervisor(own_pid), start_new_session=True
    )
    abandoned = _wait(server, parent_pid, companions, wake_reader)
    if server.poll() is not None:
        os.close(0)  # tells the trainer that it ended by itself, while what it left is still being ended
    status = _end(server, at_once=abandoned)
    return status if status >= 0 else 128 - status


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_supervisor(supervisor_pid: int) -> None:
    """In the server's process, before its program starts: end it should this supervisor be killed itself."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        os._exit(1)


def _wait(server: subprocess.Popen[bytes], parent_pid: int, companions: list[int], wake_reader: int) -> bool:
    """Sleep until the server ends, the trainer asks for its end (false), or the trainer is gone (true)."""
    with selectors.DefaultSelector() as selector:
        selector.register(wake_reader, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        for pid in companions:
            try:
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, _COMPANION)
            except ProcessLookupError:
                return True
            except OSError:
                pass  # a kernel that knows none: the parent's end must do
        while True:
            for key, _ in selector.select():
                if key.data is _COMPANION:
                    return True
                data = os.read(key.fd, 64)
                if key.fd == 0:
                    # A letter before the end of the pipe is the trainer's request; its absence, the trainer's end.
                    return not data
                if signal.SIGTERM in data and os.getppid() == parent_pid:
                    continue  # only the thread that started this process has ended
            if os.getppid() != parent_pid:
                return True
            if server.poll() is not None:
                return False
            _reap_orphans(server.pid)


def _reap_orphans(server_pid: int) -> None:
    """Take the exit status of processes that the server left to this one."""
    for pid in _children(os.getpid()):
        if pid != server_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _end(server: subprocess.Popen[bytes], *, at_once: bool) -> int:
    """End the server and everything below this process; returns the server's status."""
    if not at_once and server.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
    if server.poll() is None:  # even where /proc tells nothing of it: its end is waited for
        server.kill()
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        left = [pid for pid in _descendants(os.getpid()) if not _is_dead(pid)]
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # until their children have become ours
    return server.wait()


def _descendants(pid: int) -> list[int]:
    found = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found


def _children(pid: int) -> list[int]:
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has ended, a thread of it has, or the kernel has no such files (CONFIG_PROC_CHILDREN)
        stats = Path("/proc").glob("[0-9]*/stat")
        return [int(stat.parent.name) for stat in stats if _fields(stat)[1:2] == [str(pid)]]
    return [int(number) for text in lists for number in text.split()]


def _is_dead(pid: int) -> bool:
    """Whether a process has ended and only waits for its parent to notice."""
    fields = _fields(Path(f"/proc/{pid}/stat"))
    return not fields or fields[0] in "ZX"


def _fields(stat: Path) -> list[str]:
    """A process's state, its parent's number and so on; nothing when it is gone."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    first, *others = (int(pid) for pid in sys.argv[1].split(","))
    sys.exit(main(first, others, sys.argv[2:]))
