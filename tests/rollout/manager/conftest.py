"""Simulated engines under the real scheduler and ledger, in simulated time."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.config import SchedulingSettings
from megatron_klear.records import Grade, Prompt, RolloutGroup
from megatron_klear.rollout.endpoint import GenerationRequest
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger, StoredGroup
from megatron_klear.rollout.manager import Restart, Sampling, Scheduler
from megatron_klear.rollout.simulation import SimulatedEngine, run_simulated
from megatron_klear.rollout.simulation.clock import run_inline

M = 2
BUDGET = 120
STOP = 7


def remaining(request: GenerationRequest) -> int:
    """Tokens left of a response: most are short, some run into the budget; a function of the seed and what it has."""
    digest = hashlib.blake2b(f"{request.seed}+{len(request.token_ids)}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % 150


def grade(groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
    """By the parity of the first token, so that grades follow from tokens."""
    return [
        [
            Grade(outcome="correct", reward=1.0) if r.response_ids[0] % 2 else Grade(outcome="wrong", reward=-1.0)
            for r in group.rollouts
        ]
        for group in groups
    ]


@dataclass
class World:
    """A trainer that only counts: it takes steps, publishes versions, and remembers what it was trained on."""

    ledger: Ledger
    settings: SchedulingSettings
    engines: list[SimulatedEngine]
    per_step: int = 4
    train_seconds: float = 1.0
    publish_seconds: float = 0.0
    restart: Restart | None = None
    done_steps: int = 0
    before_step: Callable[[int, World], Any] | None = None
    trace: list[tuple[int, str, tuple[int, ...]]] = field(default_factory=list)
    staleness_seen: list[int] = field(default_factory=list)
    groups_seen: list[StoredGroup] = field(default_factory=list)
    scheduler: Scheduler | None = None

    def run(self, steps: int, num_prompts: int = 10) -> World:
        """Train up to this step in simulated time, after the `done_steps`."""
        run_simulated(self._train(steps, num_prompts))
        return self

    def prompts(self, first: int, count: int, num_prompts: int) -> list[tuple[int, Prompt]]:
        return [
            (i // num_prompts, Prompt(prompt_id=f"p{i % num_prompts}", domain="math", reference="1",
                                      token_ids=np.arange(3 + i % num_prompts, dtype=np.int64)))
            for i in range(first, first + count)
        ]  # fmt: skip

    def make_scheduler(self) -> Scheduler:
        return Scheduler(
            self.engines, self.ledger, settings=self.settings,
            sampling=Sampling(
                params=SamplingParams(
                    temperature=1.0, top_p=1.0, max_response_tokens=BUDGET, stop_token_ids=(STOP,)
                ),
                num_responses=M, seed=5, vocab_size=1000,
            ),
            groups_per_step=self.per_step, grade=grade, restart=self.restart, run_blocking=run_inline,
        )  # fmt: skip

    async def _train(self, steps: int, num_prompts: int) -> None:
        scheduler = self.scheduler = self.make_scheduler()
        try:
            await scheduler.start(version=self.done_steps, next_step=self.done_steps + 1)
            await scheduler.resume(self.done_steps)
            submitted = self.done_steps * self.per_step
            for step in range(self.done_steps + 1, steps + 1):
                # More than may be started, so that the bound holds them back and not the lack of prompts.
                while submitted < (step + scheduler.staleness + 2) * self.per_step:
                    batch = self.prompts(submitted, self.per_step, num_prompts)
                    scheduler.add(self.ledger.reserve(batch, num_responses=M))
                    submitted += self.per_step
                if self.before_step is not None:
                    self.before_step(step, self)
                groups = await scheduler.take(step, self.per_step)
                assert groups is not None
                await asyncio.sleep(self.train_seconds)
                self._note(step, groups)
                self.ledger.trained(step)
                scheduler.trained(step)
                self.done_steps = step
                await scheduler.pause()
                assert scheduler.dispatcher.num_flying == 0
                await asyncio.sleep(self.publish_seconds)
                for engine in self.engines:
                    engine.version = step
                await scheduler.resume(step)
        finally:
            await scheduler.close()

    def _note(self, step: int, groups: Sequence[StoredGroup]) -> None:
        self.groups_seen += groups
        for group in groups:
            assert group.is_complete
            tokens = tuple(int(t) for i in range(M) for t in group.rollouts[i].response_ids)
            self.trace.append((step, f"{group.epoch}/{group.prompt.prompt_id}", tokens))
            assert group.oldest_version is not None
            self.staleness_seen.append(step - 1 - group.oldest_version)


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """`make_world(engines=3, mode="async", ...)`; more keywords are settings of `scheduling`, or of `World`."""
    ledgers: list[Ledger] = []

    def make(engines: int = 3, *, slots: int = 4, **options: Any) -> World:
        own = {name: options.pop(name) for name in list(options) if name in World.__dataclass_fields__}
        options = {"stall_seconds": 20.0, "start_seconds": 60.0, "outage_seconds": 30.0, "in_flight": 8} | options
        ledger = own.pop("ledger", None) or Ledger(tmp_path / f"ledger{len(ledgers)}.sqlite")
        # Syncing a temporary file proves nothing here and takes most of the time.
        ledger.connection.execute("PRAGMA synchronous = OFF")
        ledgers.append(ledger)
        stand_ins = [
            SimulatedEngine(f"engine {i}", remaining=remaining, slots=slots, seconds_per_token=0.05, report_seconds=1.0)
            for i in range(engines)
        ]
        return World(ledger=ledger, settings=SchedulingSettings(**options), engines=stand_ins, **own)

    yield make
    for ledger in ledgers:
        ledger.close()
