"""The memory of running servers: given up and taken back over HTTP, on the first rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from megatron_klear.errors import WeightSyncError
from megatron_klear.session.turn import Turn
from megatron_klear.weight_sync import EngineGroup

Stage = Literal["kv_cache", "weights"]
_TAGS: dict[Stage, list[str]] = {"kv_cache": ["kv_cache", "cuda_graph"], "weights": ["weights"]}
"""What SGLang calls the memory of a stage. Captured graphs are needed to generate, not to load weights."""

_DRAIN_SECONDS = 120.0
_PAUSE_SECONDS = 0.5
_GIVE = "giving up memory (sglang.placement=colocated)"
_TAKE = "taking memory back (sglang.placement=colocated)"


class EngineMemory:
    """Has all servers give up and take back memory together.

    Each server must be asked to take back what it has given up, no more: SGLang 0.5.23 does not survive another
    request. That holds since servers join a group in the engines' turn only, with all their memory.

    Args:
        group: the servers that are left; one that gives no answer is ended by its `on_lost`, for its memory.
        waiting: called while answers are waited for, several times a second.
        is_stopping: whether the run is being stopped: it then waits for no server that is starting, for whoever asked
            it to stop gives it less time to save than a start may take.
    """

    def __init__(
        self, group: EngineGroup, waiting: Callable[[], None], is_stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.turn = Turn()
        self._group, self._waiting, self._is_stopping = group, waiting, is_stopping

    def quieten(self) -> None:
        """Begin the trainer's turn: end what is in flight, and wait until no server computes.

        SGLang ends itself when it is asked for its memory in the middle of a batch; a flush that succeeds proves that
        there is none.

        Raises:
            WeightSyncError: a server fails and cannot be done without; so do all methods.
        """
        self.turn.take(self._waiting, self._is_stopping)
        self._call("/pause_generation", {"mode": "abort"}, _GIVE)
        deadline = time.monotonic() + _DRAIN_SECONDS
        while True:
            try:
                return self._call("/flush_cache", {}, _GIVE)
            except WeightSyncError:
                if time.monotonic() > deadline:
                    raise
            self._waiting()
            time.sleep(_PAUSE_SECONDS)

    def release(self, stage: Stage) -> None:
        """Give up the memory of a stage; what it held is lost."""
        self._call("/release_memory_occupation", {"tags": _TAGS[stage]}, _GIVE)

    def resume(self, stage: Stage) -> None:
        """Take the memory of a stage back, its content undefined."""
        self._call("/resume_memory_occupation", {"tags": _TAGS[stage]}, _TAKE)

    def begin_engines_turn(self) -> None:
        """Let servers start from now on."""
        self.turn.give()

    def go_on(self) -> None:
        """Let the servers generate."""
        self._call("/continue_generation", {}, _TAKE)

    def _call(self, path: str, body: dict[str, object], what: str) -> None:
        self._group.call(path, body, what=what)
