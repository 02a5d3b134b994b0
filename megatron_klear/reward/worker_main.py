"""The grading worker: a child process that answers one question at a time until its socket closes.

It must not outlive its parent, whatever it is computing, and must not take the machine's memory with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

READY = b"ready"
RECURSION_LIMIT = 20_000
"""The LaTeX parser uses some twenty frames per nested brace; Python's own limit ends at about forty braces."""

_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, parent_pid: int, memory_limit_bytes: int, cpu_microseconds: int) -> None:
    """Serve questions from `socket_fd`.

    Messages are JSON: `[number, answer, reference, is_boxed]` in, `[number, outcome, reason]` out.

    Args:
        socket_fd: inherited socket to the parent.
        parent_pid: process that started this one; this process dies with it.
        memory_limit_bytes: address space this process may use, 0 for no limit.
        cpu_microseconds: CPU time of one question; then the kernel ends this process with SIGPROF.
    """
    _die_with_parent(parent_pid)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it closes the socket
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION_LIMIT)
    if memory_limit_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))

    # Only now: imports take most of the start-up time, and the limits above must hold from the first moment.
    from megatron_klear.reward.answers import Question
    from megatron_klear.reward.compare import MathVerify

    grader = MathVerify()
    # Loads the parser's tables, and what sympy imports late for sets and relations, outside any answer's time.
    grader.judge(Question(r"\frac{1}{2}", "0.5"))
    grader.judge(Question(r"x \le 2", r"(-\infty,2]"))
    with Connection(socket_fd) as connection, contextlib.suppress(EOFError, OSError):
        connection.send_bytes(READY)
        _silence()
        while True:
            number, answer, reference, is_boxed = json.loads(connection.recv_bytes())
            # The default action of SIGPROF ends a process also within one C call, as 9^(9^9) is. CPU time, so that a
            # busy machine changes no grade.
            signal.setitimer(signal.ITIMER_PROF, cpu_microseconds * 1e-6)
            verdict = grader.judge(Question(answer, reference, is_boxed=is_boxed))
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            connection.send_bytes(json.dumps([number, verdict.outcome, verdict.reason]).encode("ascii"))


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent's thread ends: a process busy in C code sees no closed socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        raise SystemExit("the parent process is gone")


def _silence() -> None:
    """Send what parsers print to nowhere; up to here, errors went to the parent's start-up message."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)
