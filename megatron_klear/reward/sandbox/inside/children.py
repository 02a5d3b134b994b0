"""Untrusted processes: started under limits, watched, and ended together with whatever they left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from megatron_klear.reward.sandbox.inside import kernel

ENDED, OVER_CPU, OVER_WALL, OVER_OUTPUT = range(4)

ERROR_TAIL_BYTES = 2000
NUMBER = struct.Struct("<Q")
"""On the control socket: the number of the test whose time by the clock is over."""

_READ_BYTES = 1 << 16
_FIRST_FREE_FD = 200  # above all that a sandbox opens, below the usual limit of 1024


class Ended(NamedTuple):
    """How a test's process ended.

    Attributes:
        limit: ENDED by itself, or the limit that it was killed for.
        status: exit status, negative for a signal.
        output: what it wrote to the watched file descriptor.
        errors: the end of what it wrote to stderr.
    """

    limit: int
    status: int
    output: bytes
    errors: bytes


class Box:
    """Where untrusted processes run, and within what limits.

    Args:
        settings: `Limits.to_message`, with `filter`, `pid_placeholder`, `scratch` and `isolated` added, and `number`,
            that of the first test to be watched.
        control_fd: brings the numbers of tests to end. Whoever sends them sees more than can be seen in here.
    """

    def __init__(self, settings: dict[str, Any], control_fd: int) -> None:
        self.settings = settings
        self._control_fd = control_fd
        self._number = settings["number"]
        self._null = os.open(os.devnull, os.O_RDWR)
        self._has_scratch = False
        self._started: list[int] = []

    def fresh_scratch(self) -> None:
        """Empty the scratch folder, whatever has been put there."""
        scratch = self.settings["scratch"]
        if self.settings["isolated"]:
            if self._has_scratch:
                kernel.unmount(scratch)
            kernel.mount_scratch(scratch, self.settings["scratch_bytes"], self.settings["scratch_files"])
            self._has_scratch = True
        else:
            # Not Python's rmtree, which recurses: code may have nested folders without end.
            os.waitpid(os.posix_spawnp("rm", ["rm", "-rf", scratch], {"PATH": "/usr/bin:/bin"}), 0)
            os.makedirs(scratch, mode=0o700, exist_ok=True)

    def start(self, body: Callable[[], None], fds: Sequence[int | None]) -> int:
        """Fork a process that runs `body` under all limits.

        Args:
            body: what to run; it cannot return to the caller's code.
            fds: what its file descriptors 0, 1, 2, ... are; None is /dev/null. It has no others.

        Returns:
            Its process id.
        """
        pid = os.fork()
        if pid:
            self._started.append(pid)
            return pid
        try:
            self._enter([self._null if fd is None else fd for fd in fds])
            body()
        finally:
            _leave()

    def watch(self, pid: int, output_fd: int, errors_fd: int, room: int) -> Ended:
        """Read what a process writes until it ends, passes a limit or is to be ended; then end all of the test.

        Args:
            pid: of the process whose end is the end of the test.
            output_fd, errors_fd: read ends of the pipes that it writes its output and its errors to.
            room: most bytes of either.
        """
        output, errors = bytearray(), bytearray()
        limit, error_bytes = ENDED, 0
        pidfd = os.pidfd_open(pid)
        poller = select.poll()
        for fd in (pidfd, output_fd, errors_fd, self._control_fd):
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        running = True
        while running:
            ready = {fd for fd, _ in poller.poll()}
            running = pidfd not in ready
            for fd in ready - {pidfd, self._control_fd}:
                data = _read(fd)
                if not data:
                    poller.unregister(fd)
                elif fd == output_fd:
                    output += data
                else:
                    error_bytes += len(data)
                    errors = (errors + data)[-ERROR_TAIL_BYTES:]
            if running and self._control_fd in ready and self._is_told_to_end():
                limit, running = OVER_WALL, False
            elif max(len(output), error_bytes) > room:
                limit, running = OVER_OUTPUT, False
        os.close(pidfd)
        self._number += 1
        status, cpu_seconds = self._end_all(pid)
        # What was still in the pipes when it ended: at most a pipe's buffer, since all writers are gone.
        while limit == ENDED and len(output) <= room and (data := _read(output_fd)):
            output += data
        errors = (errors + (_read(errors_fd) or b""))[-ERROR_TAIL_BYTES:]
        if limit == ENDED and len(output) > room:
            limit = OVER_OUTPUT
        if limit == ENDED and (cpu_seconds > self.settings["cpu_seconds"] or status == -signal.SIGXCPU):
            limit = OVER_CPU
        return Ended(limit, status, bytes(output[:room]), bytes(errors))

    def _is_told_to_end(self) -> bool:
        """Whether the control socket names this test; an earlier one may have ended by itself before it was named."""
        data = _read(self._control_fd)
        if data == b"":
            raise EOFError("the other side is gone")
        return data is not None and NUMBER.unpack(data[-NUMBER.size :])[0] == self._number

    def _enter(self, fds: list[int]) -> None:
        """Turn a fresh child into an untrusted process."""
        if not self.settings["isolated"]:
            kernel.die_with_parent()
        os.setsid()
        for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_FREE_FD) for fd in fds]):
            os.dup2(fd, number)
        os.closerange(len(fds), _FIRST_FREE_FD + 64)
        os.chdir(self.settings["scratch"])
        kernel.set_limits(self.settings)
        if self.settings["isolated"]:
            kernel.drop_capabilities()
        if self.settings["filter"]:
            kernel.install_filter(self.settings["filter"], self.settings["pid_placeholder"])

    def _end_all(self, pid: int) -> tuple[int, float]:
        """Kill and reap every process of the test; exit status and CPU seconds of the one watched."""
        if self.settings["isolated"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # this is the first process of its namespace, and not killed by this
        for started in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started, signal.SIGKILL)
        self._started.clear()
        status, cpu_seconds = -signal.SIGKILL, 0.0
        try:
            while True:
                reaped, wait_status, usage = os.wait4(-1, 0)
                if reaped == pid:
                    status = os.waitstatus_to_exitcode(wait_status)
                    cpu_seconds = usage.ru_utime + usage.ru_stime
        except ChildProcessError:
            return status, cpu_seconds


def _read(fd: int) -> bytes | None:
    """What can be read now: nothing at the end, None where nothing is there yet."""
    try:
        return os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _leave() -> NoReturn:
    """End this process, whatever untrusted code has made of the functions that do so."""
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    while True:
        os._exit(1)
