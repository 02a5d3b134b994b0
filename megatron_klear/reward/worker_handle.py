"""The parent's side of one grading worker: start it, ask it, kill it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from multiprocessing import Pipe
from typing import cast

from megatron_klear.records import Outcome
from megatron_klear.reward.answers import Question
from megatron_klear.reward.pool import Died, Overrun, StartError, TimedOut
from megatron_klear.reward.rules import Verdict
from megatron_klear.reward.worker_main import READY

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 120.0
WALL_CLOCK_FACTOR = 10.0
"""The wall-clock limit, in CPU limits: for a worker that is stopped, or waits for the machine."""
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

# A bare -c and not multiprocessing's spawn: that one would import the entry's main module, torch included.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_klear.reward.worker_main import main; main(*map(int, sys.argv[2:]))"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Worker:
    """One child process and the socket to it; used by a single thread, but `kill` may come from any.

    Args:
        memory_limit_bytes: address space, 0 for no limit.
        cpu_seconds: CPU time of one question, in which the kernel ends the process; ten times that on the wall clock.

    Raises:
        StartError: the process, its socket or its error file cannot be made.
    """

    def __init__(self, memory_limit_bytes: int, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._number = 0
        with ExitStack() as on_failure:
            try:
                self._errors = on_failure.enter_context(tempfile.TemporaryFile())
                self._connection, theirs = Pipe(duplex=True)
                on_failure.enter_context(self._connection)
                with theirs:
                    self._process = self._start(theirs.fileno(), memory_limit_bytes)
            except OSError as error:
                raise StartError(f"{sys.executable}: {error}") from error
            on_failure.pop_all()

    def _start(self, socket_fd: int, memory_limit_bytes: int) -> subprocess.Popen[bytes]:
        cpu_microseconds = max(1, round(self._cpu_seconds * 1e6))
        numbers = [str(number) for number in (socket_fd, os.getpid(), memory_limit_bytes, cpu_microseconds)]
        return subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps([str(entry) for entry in sys.path]), *numbers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[socket_fd],
            env={**os.environ, **_ONE_THREAD},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Block until the worker has imported what it needs.

        Raises:
            StartError: it ended or did not report in time; carries the end of what it printed.
        """
        try:
            if not self._connection.poll(START_TIMEOUT_SECONDS):
                raise StartError(f"not ready after {START_TIMEOUT_SECONDS:.0f} s")
            if self._connection.recv_bytes() == READY:
                return
        except (EOFError, OSError):
            pass
        self.kill()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip()
        raise StartError(f"exit status {self._process.returncode}: {printed[-1500:] or 'nothing printed'}")

    def ask(self, question: Question) -> Verdict:
        """The worker's verdict.

        Raises:
            TimedOut, Overrun, Died: the worker is of no more use.
        """
        self._number += 1
        message = json.dumps([self._number, question.answer, question.reference, question.is_boxed])
        wall_seconds = self._cpu_seconds * WALL_CLOCK_FACTOR
        try:
            self._connection.send_bytes(message.encode("ascii"))
            if not self._connection.poll(wall_seconds):
                raise TimedOut(
                    f"no verdict within {wall_seconds:g} s, though less than {self._cpu_seconds:g} s of CPU time"
                )
            number, outcome, reason = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError, ValueError, TypeError) as error:
            self.kill()
            status = self._process.returncode
            if status == -signal.SIGPROF:
                raise Overrun(f"took more than {self._cpu_seconds:g} s of CPU time") from error
            raise Died(f"exit status {status}", crashed=-status in _CRASHES) from error
        if number != self._number:
            raise Died("it answered another question")
        return Verdict(cast(Outcome, outcome), reason or question.no_answer_reason)

    def kill(self) -> None:
        """End the process at once and reap it."""
        self._process.kill()
        try:
            self._process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            logger.warning("grading worker %d does not end after SIGKILL", self.pid)

    def discard(self) -> None:
        """Kill and give back the socket and file; only from the thread that uses the worker."""
        self.kill()
        self._connection.close()
        self._errors.close()
