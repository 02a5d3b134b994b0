"""Whose the GPUs' memory is, where trainer and engines use the same: every handover stands here, in its order.

| the engines have          | the trainer has                         | until                                      |
|---------------------------|-----------------------------------------|--------------------------------------------|
| weights, KV cache, graphs | weights (unless `offload_weights`)      | a step's responses are there: `to_trainer` |
| nothing                   | weights, optimizer state, gradients     | the updates are done: `to_engines`         |
| weights                   | weights                                 | the new weights are proved: `resume_cache` |

A checkpoint in the engines' turn takes the KV cache's place for as long as it is written (`saving`). Memory is measured
after each handover, and before the engines take theirs: one that finds too little would end itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_klear.errors import RolloutError
from megatron_klear.observe import MemoryReading, names, read_memory
from megatron_klear.observe.jsonl import JsonLinesFile
from megatron_klear.parallel import FirstRank
from megatron_klear.session.engine_memory import EngineMemory, Stage
from megatron_klear.session.session import Session
from megatron_klear.trainer import PARTS

log = logging.getLogger(__name__)

MEMORY_FILE = "memory.jsonl"
_Result = TypeVar("_Result")


class Handover:
    """Hands the memory of the GPUs to and fro; every rank has one, and its methods are collectives.

    Args:
        session: the run; its checkpoints are saved inside `saving` from now on.
        first_rank: speaks to the engines while the other ranks wait.
        read: tells what memory is free and used.
    """

    def __init__(
        self, session: Session, first_rank: FirstRank, read: Callable[[], MemoryReading] = read_memory
    ) -> None:
        self._session, self._first_rank, self._read = session, first_rank, read
        self._memory = session.trainer.memory
        self._offloads_weights = session.settings.sglang.offload_weights
        self._is_gpu = session.context.device.type == "cuda"
        self._engines: EngineMemory | None = None  # on the first rank, once they have started
        self._held: set[Stage] = set()
        self._needs: dict[Stage, int] = {}
        session.around_save = self.saving
        path = session.root / "logs" / MEMORY_FILE
        self._file = JsonLinesFile(path) if session.is_first else None
        if not self._is_gpu and session.is_first:
            log.info("memory is handed over step by step, but SGLang's servers on a CPU keep theirs")

    def make_room(self) -> None:
        """Before servers start, which size their KV cache by what is free."""
        self._memory.offload("gradients", "optimizer")
        if self._offloads_weights:
            self._memory.offload("weights")

    def engines_started(self, engines: EngineMemory | None) -> None:
        """Take over servers that have just started; they give everything up until there are weights for them.

        Args:
            engines: on the first rank.
        """
        self._engines = engines
        self._held = {"weights", "kv_cache"}
        self.to_trainer()

    def to_trainer(self) -> None:
        """The engines have answered all that was asked; the ranks are about to compute."""
        self._release("kv_cache", "weights")
        self._memory.restore(*PARTS)
        self._report("trainer")

    def to_engines(self, publish: Callable[[], _Result]) -> _Result:
        """The updates are done; the engines get memory, then the new weights, then the rest of their memory.

        Args:
            publish: sends the trainer's weights, and calls `resume_cache` before the engines go on.

        Raises:
            RolloutError: a GPU has less free than its engine needs.
            WeightSyncError: an engine cannot take its memory back, or `publish` fails.
        """
        self._release("kv_cache", "weights")
        self._memory.offload("gradients", "optimizer")
        self._memory.restore("weights")
        self._resume("weights")
        return publish()

    def resume_cache(self) -> None:
        """The engines have the new weights, proved; from here on they have all their memory."""
        if self._offloads_weights:
            self._memory.offload("weights")
        self._resume("kv_cache")
        self._first_rank.run("begin the engines' turn", lambda: self._running.begin_engines_turn())
        self._report("engines")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a checkpoint, which needs the trainer's state on its device, whosever turn it is.

        Responses in flight, if the run is being stopped, are interrupted: there is no KV cache for them meanwhile.
        """
        away = self._memory.away()
        if "optimizer" not in away:
            yield
            return
        was_held = "kv_cache" in self._held
        self._release("kv_cache")
        self._memory.restore(*(away - {"gradients"}))
        yield
        self._memory.offload(*away)
        if was_held:
            self._resume("kv_cache")
            self._first_rank.run("begin the engines' turn", lambda: self._running.begin_engines_turn())
            self._first_rank.run("let the engines go on", lambda: self._running.go_on())

    @property
    def _running(self) -> EngineMemory:
        assert self._engines is not None
        return self._engines

    def _release(self, *stages: Stage) -> None:
        """Have the engines give up what they hold of these, and note how much each GPU got back."""
        leaving = [stage for stage in stages if stage in self._held]
        if leaving:
            self._first_rank.run("quieten the engines", lambda: self._running.quieten())
        for stage in leaving:
            before = self._read().device_free_bytes
            self._gathered(None)  # so that every rank has looked before the first one goes ahead
            self._first_rank.run("have the engines give up memory", partial(self._give_up, stage))
            self._held.discard(stage)
            if self._is_gpu:
                self._needs[stage] = max(0, self._read().device_free_bytes - before)

    def _give_up(self, stage: Stage) -> None:
        self._running.release(stage)

    def _resume(self, stage: Stage) -> None:
        self._require_room(stage)
        self._first_rank.run("have the engines take memory back", lambda: self._running.resume(stage))
        self._held.add(stage)

    def _require_room(self, stage: Stage) -> None:
        """Refuse to wake engines that would find less memory than they gave up.

        Raises:
            RolloutError: on every rank; names the ranks on whose GPUs there is too little.
        """
        mine = (self._read().device_free_bytes, self._needs.get(stage, 0))
        short = [
            f"rank {rank}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed"
            for rank, (free, needed) in enumerate(self._gathered(mine))
            if free < needed
        ]
        if short:
            what = "weights" if stage == "weights" else "KV cache and graphs"
            raise RolloutError(
                f"there is too little memory for the engines' {what} beside the trainer and whatever else uses these "
                f"GPUs ({'; '.join(short)}); lower sglang.memory_fraction, set sglang.offload_weights=true, or "
                "sglang.placement=separate"
            )

    def _report(self, turn: names.Turn) -> None:
        """Measure on every rank; the extremes become metrics of the step, each rank's numbers a line of a file."""
        mine = asdict(self._read()) | {"trainer_bytes": sum(self._memory.num_bytes(part) for part in PARTS)}
        rows = self._gathered(mine)
        for name in mine:
            worst = min if name.endswith("_free_bytes") else max
            self._session.noted[names.at_turn(turn, name)] = worst(row[name] for row in rows)
        if self._file is not None:
            for rank, row in enumerate(rows):
                self._file.append({"step": self._session.step, "turn": turn, "rank": rank, **row})

    def _gathered(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self._session.context.world.size
        dist.all_gather_object(everyone, mine)
        return everyone
