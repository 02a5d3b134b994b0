"""A word on who is missing, before the time limit of an exchange ends the run.

With gloo an exchange that waits too long raises, and the ranks that are left name the missing one (session/launch.py).
NCCL's watchdog ends the process instead, and no line of Python runs any more. So a thread of every rank looks at how
long there has been no news, and one of them tells while there is still time.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import FrameType

from megatron_klear.observe.heartbeat import Heartbeat, living_ranks, whereabouts

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_SHOWN_RANKS = 16
_LONGEST_TICK = 10.0
_LONGEST_MARGIN = 60.0


class StallWatch:
    """Watches this rank's heartbeat in a thread; made in the thread that trains.

    Past half of the limit it notes that the process lives and where in the program the rank is. Shortly before the
    limit the lowest rank that lives prints where all ranks were last seen, and again after every half of the limit.

    Args:
        heartbeat: of this rank.
        run_dir: the run directory.
        rank: of this process.
        world_size: number of ranks; one has nobody to wait for.
        limit_seconds: parallel.timeout_seconds.
    """

    def __init__(
        self, heartbeat: Heartbeat, run_dir: str | Path, *, rank: int, world_size: int, limit_seconds: float
    ) -> None:
        self._heartbeat, self._run_dir = heartbeat, run_dir
        self._rank, self._world_size, self._limit = rank, world_size, limit_seconds
        self._tick = min(_LONGEST_TICK, limit_seconds / 20)
        self._tell_at = limit_seconds - min(_LONGEST_MARGIN, limit_seconds / 4)
        self._trainer = threading.get_ident()
        self._closed = threading.Event()
        if world_size > 1:
            threading.Thread(target=self._watch, name="stall watch", daemon=True).start()

    def close(self) -> None:
        """Watch no more; a second call does nothing."""
        self._closed.set()

    def _watch(self) -> None:
        next_at = self._tell_at
        while not self._closed.wait(self._tick):
            silent = self._heartbeat.silent_seconds
            if silent < self._limit / 2:
                next_at = self._tell_at
                continue
            self._heartbeat.sign(self._place())
            if silent > next_at:
                next_at += self._limit / 2
                self._tell(silent)

    def _tell(self, silent: float) -> None:
        living = living_ranks(self._run_dir, self._world_size, 4 * self._tick)
        if self._rank != min(living, default=self._rank):
            return
        lines = whereabouts(self._run_dir, self._world_size)[:_SHOWN_RANKS]
        said = (
            f"[rank {self._rank}] no news for {silent:.0f} s, and an exchange between ranks is given up after "
            f"{self._limit:.0f} s (parallel.timeout_seconds); where the ranks were last seen:"
        )
        print("\n".join([said, *lines]), file=sys.stderr, flush=True)

    def _place(self) -> str:
        """Innermost line of this package that the training thread is at."""
        frame: FrameType | None = sys._current_frames().get(self._trainer)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(_PACKAGE):
                return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "an unknown place"
