"""One server process: started under its supervisor, watched, ended."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_LOG_TAIL_BYTES = 64 * 1024
_STOP_SECONDS = 40.0


class ServerProcess:
    """A serving command that ends, with everything it started, when `stop` is called or this process ends in any way.

    Args:
        command: program and arguments.
        environment: its environment variables.
        log: file that its output is added to.
        companions: processes beside this one, on the same machine, with any of which it ends, too.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        companions: Sequence[int] = (),
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        watched = ",".join(str(pid) for pid in dict.fromkeys((os.getpid(), *companions)))
        with log.open("ab") as output:
            output.write(f"--- {' '.join(command)}\n".encode())
            output.flush()
            self._log_start = output.tell()
            # -I -S: neither our path nor site-packages; it needs nothing of either and starts in milliseconds.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), watched, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._supervisor.pid

    def exit_status(self) -> int | None:
        """None while it runs; 128 + number when a signal ended the server."""
        return self._supervisor.poll()

    def has_ended_itself(self, seconds: float = 0.0) -> bool:
        """Whether the server ended without being asked to; processes that it left may still be on their way out.

        Args:
            seconds: how long to wait for that.
        """
        stdin = self._supervisor.stdin
        if stdin is None or stdin.closed:  # it was asked
            return False
        reader = select.poll()
        reader.register(stdin.fileno(), 0)  # that a pipe has no reader is told without being asked for
        return bool(reader.poll(seconds * 1000)) or self.exit_status() is not None

    def log_tail(self, lines: int = 25) -> str:
        """The end of what this process has printed, without that of earlier ones into the same file."""
        with contextlib.suppress(OSError), self.log.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            return "\n".join(opened.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    def request_stop(self) -> None:
        """Ask it to end; returns at once."""
        stdin = self._supervisor.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError):  # it has ended by itself
                stdin.write(b"q")
                stdin.flush()
            with contextlib.suppress(OSError):
                stdin.close()

    def stop(self) -> None:
        """End it and everything it started, and wait for that; a second call does nothing."""
        self.request_stop()
        try:
            self._supervisor.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_all()

    def _kill_all(self) -> None:
        """Do the supervisor's work: it is stopped, or cannot go on."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self._supervisor.pid)
            for process in [*supervisor.children(recursive=True), supervisor]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._supervisor.wait()
