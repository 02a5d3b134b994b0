"""The window of a run in which a profiler records."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_klear.config.profiling import ProfileSettings
from megatron_klear.observe.ranges import OpenRange

log = logging.getLogger(__name__)

PROFILE_DIR = "profile"


class ProfileWindow:
    """Records the steps that `profile` asks for, on the ranks that it names; does nothing on others.

    Args:
        settings: section `profile`.
        root: the run directory; traces of torch's profiler go to `profile` in it.
        rank: this process's.
    """

    def __init__(self, settings: ProfileSettings, root: Path, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._folder = root / PROFILE_DIR
        self._profiler: Any = None
        self._step: OpenRange | None = None
        self._recording = self._done = False
        self.wanted = settings.tool != "none" and rank in settings.ranks

    def begin_step(self, step: int) -> None:
        """Called before each step; opens the window at the first one that is due, also of a run resumed inside it."""
        if not self.wanted or not self._settings.first_step <= step <= self._settings.last_step:
            return
        if not self._recording:
            self._start()
        self._step = OpenRange(f"step {step}")

    def end_step(self, step: int) -> None:
        """Called after each step; closes the window behind the last one that is due."""
        if self._step is not None:
            self._step.close()
            self._step = None
        if self._recording and step >= self._settings.last_step:
            self.close(step)

    def close(self, step: int) -> None:
        """Closes the window if it is open, as when the run ends inside it."""
        if not self._recording:
            if self.wanted and not self._done:
                first, last = self._settings.first_step, self._settings.last_step
                log.warning("profile: nothing was recorded, steps %d to %d did not run here", first, last)
                self._done = True
            return
        self._recording, self._done = False, True
        if self._step is not None:
            self._step.close()
            self._step = None
        if self._profiler is None:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            log.info("profile: window closed after step %d", step)
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._folder / f"steps_{self._settings.first_step}_to_{step}_rank_{self._rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a trace is no reason to lose a run
            log.error("profile: cannot write %s: %s", path, error)
            return
        log.info("profile: %s (python -m megatron_klear.observe.trace FILE shows the most of it)", path)

    def _start(self) -> None:
        self._recording = True
        if self._settings.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds)
        self._profiler.start()
