"""What became of every server that the soak has killed."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

AGAIN = "killed again before it served"
UNKNOWN = "not yet told"


@dataclass(kw_only=True)
class Kill:
    """SIGKILL to processes of a server.

    Attributes:
        life: of the trainer.
        step: newest finished one.
        server: its number; None where it is not known.
        processes: how many were alive and got the signal.
        served_again_after: seconds until the same life said that the server serves again; None when it did not.
        outcome: in words.
    """

    life: int
    step: int
    server: int | None
    processes: int
    served_again_after: float | None = None
    outcome: str = UNKNOWN


class Kills:
    """Kills servers, and follows what the trainer says of them.

    Args:
        output: what rank 0 has printed in the present life.
        clock: seconds.
    """

    def __init__(self, output: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._output, self._clock = output, clock
        self._open: list[tuple[Kill, int, float]] = []  # with characters printed until then, and when
        self.all: list[Kill] = []

    def kill(self, processes: Sequence[psutil.Process], *, server: int | None, life: int, step: int) -> bool:
        """SIGKILL to processes of a server; returns whether any of them was alive."""
        self.look()
        met = sum(killed(process) for process in processes)
        if not met:
            return False
        for before, _, _ in self._open:
            if before.server == server and server is not None:
                before.outcome = AGAIN
        self._open = [entry for entry in self._open if entry[0].outcome == UNKNOWN]
        made = Kill(life=life, step=step, server=server, processes=met)
        self.all.append(made)
        self._open.append((made, len(self._output()), self._clock()))
        return True

    def look(self) -> None:
        """Note who serves again; several times a second, for the seconds to be right."""
        if not self._open:
            return
        output = self._output()
        for made, printed, since in self._open:
            if re.search(rf"engine {made.server} \(\S+\) serves again", output[printed:]):
                made.served_again_after, made.outcome = round(self._clock() - since, 1), "served again"
        self._open = [entry for entry in self._open if entry[0].outcome == UNKNOWN]

    def end_life(self, why: str) -> None:
        """The trainer has ended, and all servers with it.

        Args:
            why: in words.
        """
        self.look()
        for made, _, since in self._open:
            made.outcome = f"{why} {self._clock() - since:.0f} s later, before the server served again"
        self._open = []

    def told(self) -> list[dict[str, object]]:
        """All of them, for the result."""
        return [asdict(made) for made in self.all]


def killed(process: psutil.Process) -> bool:
    """SIGKILL to a process; returns whether it was alive."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return False
    return True


def number_of(server: psutil.Process) -> int | None:
    """A server's number, by the log that it writes."""
    try:
        log = Path(f"/proc/{server.pid}/fd/1").readlink().name
    except OSError:
        return None
    found = re.fullmatch(r"engine_(\d+)\.log", log)
    return int(found[1]) if found else None
