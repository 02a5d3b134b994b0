"""Where every rank was last seen, so that a run that waits for one of them can say which.

A collective that times out says only that it waited. Each rank therefore notes step and phase in a file of its own
whenever they change; the ranks that are left after a failure read all of them.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from pathlib import Path

LOGS_FOLDER = "logs"
_RENEW_SECONDS = 1.0


class Heartbeat:
    """This rank's note in `run_dir/logs`.

    Args:
        run_dir: the run directory.
        rank: of this process.
    """

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        folder = Path(run_dir) / LOGS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{rank:05d}.json"
        self._last: tuple[int, str] = (0, "start")
        self._written, self._time = time.monotonic(), 0.0
        self._writing = threading.Lock()

    @property
    def silent_seconds(self) -> float:
        """How long ago the last news was."""
        return time.monotonic() - self._written

    def beat(self, step: int, phase: str) -> None:
        """Note that this rank now does `phase` of `step`; a full disk is no reason to stop."""
        self._last, self._written, self._time = (step, phase), time.monotonic(), time.time()
        self._write({})

    def sign(self, place: str) -> None:
        """Note that there is no news, but that the process lives.

        Args:
            place: in the program, where the rank is.
        """
        self._write({"alive": time.time(), "place": place})

    def _write(self, more: dict[str, object]) -> None:
        # Replaced whole: a rank that is stopped in the middle of writing must not seem never to have reported.
        fresh = self._path.with_suffix(".new")
        with self._writing:
            step, phase = self._last
            note = {
                "step": step,
                "phase": phase,
                "time": self._time or time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            try:
                fresh.write_text(json.dumps({**note, **more}) + "\n")
                os.replace(fresh, self._path)
            except OSError:
                return

    def renew(self) -> None:
        """Note that this rank is still at what it noted last; writes once a second at most."""
        if time.monotonic() - self._written > _RENEW_SECONDS:
            self.beat(*self._last)


def living_ranks(run_dir: str | Path, world_size: int, seconds: float) -> list[int]:
    """Ranks that gave news or a sign of life in the last `seconds`."""
    found = []
    for rank in range(world_size):
        try:
            note = json.loads((Path(run_dir) / LOGS_FOLDER / f"rank_{rank:05d}.json").read_text())
            if time.time() - max(float(note["time"]), float(note.get("alive", 0.0))) < seconds:
                found.append(rank)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def note_failure(run_dir: str | Path, rank: int) -> None:
    """Note that this rank has failed where it was last: it is then not the one that the others wait for."""
    path = Path(run_dir) / LOGS_FOLDER / f"rank_{rank:05d}.json"
    try:
        note = json.loads(path.read_text())
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({**note, "time": time.time(), "failed": True}) + "\n")
        os.replace(fresh, path)
    except (OSError, ValueError, TypeError):
        return


def whereabouts(run_dir: str | Path, world_size: int) -> list[str]:
    """One line per rank, dead ones first, then the longest silent: who to look at when a run fails or hangs.

    Ranks that noted a failure of their own, such as having waited too long, come last, and before them those that have
    no news but whose process gives signs of life. Whether a process has ended is known of those on this machine.

    Args:
        run_dir: the run directory.
        world_size: number of ranks that there should be.
    """
    now = time.time()
    seen: list[tuple[float, str]] = []
    for rank in range(world_size):
        path = Path(run_dir) / LOGS_FOLDER / f"rank_{rank:05d}.json"
        try:
            note = json.loads(path.read_text())
            silent = now - float(note["time"])
            text = f"rank {rank}: in step {note['step']}, {note['phase']}, no news for {silent:.0f} s"
            if "alive" in note:
                silent = now - float(note["alive"])
                text += f", its process lived {silent:.0f} s ago, at {note['place']}"
            if note.get("failed"):
                silent, text = -1.0, f"rank {rank}: in step {note['step']}, {note['phase']}, failed {silent:.0f} s ago"
            elif note.get("host") == socket.gethostname() and not _is_running(int(note["pid"])):
                silent, text = math.inf, f"{text}; its process has ended"
        except (OSError, ValueError, KeyError, TypeError):
            silent, text = math.inf, f"rank {rank}: never reported"
        seen.append((silent, text))
    return [text for _, text in sorted(seen, key=lambda pair: -pair[0])]


def ranks_that_reported(run_dir: str | Path) -> int:
    """One more than the highest rank of which there is a note; ranks below it that never reported count, too."""
    found = [path.stem.removeprefix("rank_") for path in (Path(run_dir) / LOGS_FOLDER).glob("rank_*.json")]
    return max((int(number) + 1 for number in found if number.isdigit()), default=0)


def _is_running(pid: int) -> bool:
    """Whether a process of this machine lives; one that its parent has yet to collect does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()  # a system that does not tell
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")
