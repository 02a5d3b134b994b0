"""Which prompts a run trains over several lives: killed, asked to stop, with other settings, with and without servers.

The ledger, the manager and the walk over the data are real; engines are simulated and there is no model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from megatron_klear import parallel
from megatron_klear.config import (
    ModelSettings,
    ParallelSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    SchedulingSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.data import DataCursor
from megatron_klear.records import Grade, ParallelContext, Prompt, Rollout, RolloutGroup, ScoredGroup
from megatron_klear.rollout.ledger import LEDGER_FILE, LedgerReader, scored_group
from megatron_klear.rollout.simulation import SimulatedEngine
from megatron_klear.session import managed
from megatron_klear.session.ledger import RunLedger
from megatron_klear.session.managed import ManagedGroups

ROWS = 97
PROMPTS = [
    Prompt(prompt_id=f"p{i}", domain="math", reference="1", token_ids=np.arange(3 + i % 5, dtype=np.int64))
    for i in range(ROWS)
]
RIGHT = Grade(outcome="correct", reward=1.0)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


class Data:
    fingerprint = "data"
    prompts = PROMPTS

    def __len__(self) -> int:
        return ROWS


@dataclass(frozen=True)
class Life:
    """From the newest checkpoint to an end: killed before the checkpoint of a step, asked to stop after one, or done.

    `per_step`, `total`, `every`: rl.prompts_per_step, rl.steps, checkpoint.every_steps.
    `falls_back`: the newest checkpoint is damaged, and it goes on from the one before.
    """

    killed_in: int | None = None
    stopped_at: int | None = None
    per_step: int = 3
    total: int = 20
    every: int = 5
    mode: Literal["sync", "one_step_off", "async"] = "one_step_off"
    order: Literal["fixed", "completion"] = "fixed"
    served: bool = True
    loses_ledger: bool = False
    falls_back: bool = False


@dataclass
class Run:
    root: Path
    context: ParallelContext
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    trained: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    """(epoch, prompt) of each step of the history that counts."""

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def live(self, life: Life) -> None:
        """One life; its steps count as far as a checkpoint has them."""
        history: dict[int, list[tuple[int, str]]] = {}
        if life.falls_back:
            self.checkpoints.pop()
        session = self._session(life)
        session.is_asked_to_stop = lambda: life.stopped_at == session.step + 1
        data: Any = Data()
        cursor = DataCursor(ROWS, life.per_step, seed=3, fingerprint="data")
        if self.checkpoint is not None:
            cursor.load_state(self.checkpoint["cursor"])
        engines = [
            SimulatedEngine(
                f"engine {i}", remaining=lambda request: 1 + request.seed % 20, slots=8, seconds_per_token=2e-4,
                report_seconds=0.05, version=session.step,
            )
            for i in range(2)
        ]  # fmt: skip
        rollouts: Any = SimpleNamespace(
            stop_token_ids=(7,), grade=lambda groups: [[RIGHT] * len(g.rollouts) for g in groups],
            generate=lambda missing, step, on_rollout: [drawn(prompt, step) for prompt in missing],
            score=lambda missing, groups: [graded(group) for group in groups],
            score_stored=lambda groups: [graded(group) for group in groups],
        )  # fmt: skip
        source: Any = (
            ManagedGroups(session, data, rollouts, lambda: engines) if life.served else RunLedger(session, data)
        )
        with source:
            with source.publishing(session.step):
                pass
            while session.step < life.total:
                step = session.step + 1
                found = source.groups(step, cursor, rollouts)
                history[step] = self._keys(step, [g.group.prompt.prompt_id for g in found])
                source.trained(step)
                is_to_stop = life.served and life.stopped_at == step < life.total
                with source.publishing(step) as publishes:
                    # A publish may wait for a server that joins, and whoever stops the run for nobody.
                    assert publishes != is_to_stop
                    for engine in engines if publishes else ():
                        engine.version = step
                if life.killed_in == step:
                    return
                session.step = step
                if step % life.every == 0 or step in (life.stopped_at, life.total):
                    state = {"step": step, "cursor": cursor.state_dict(), "ledger": session.ledger_position()}
                    self.checkpoints.append(json.loads(json.dumps(state)))
                    session.saved_step = step
                    self.trained = {s: keys for s, keys in self.trained.items() if s < min(history)} | history
                if life.stopped_at == step:
                    break
        if life.loses_ledger:
            for file in self.root.glob(f"{LEDGER_FILE}*"):
                file.unlink()

    def _keys(self, step: int, prompt_ids: list[str]) -> list[tuple[int, str]]:
        with LedgerReader(self.root / LEDGER_FILE) as reader:
            keys = [(group.epoch, group.prompt.prompt_id) for group in reader.groups_of_step(step)]
        assert len(keys) == len(prompt_ids)
        return keys

    def _session(self, life: Life) -> Any:
        (self.root / "tokenizer").mkdir(parents=True, exist_ok=True)
        (self.root / "tokenizer" / "tokenizer.json").write_text("{}")
        settings = Settings(
            run=RunSettings(dir=str(self.root), seed=3),
            tokenizer=TokenizerSettings(dir=str(self.root / "tokenizer")),
            model=ModelSettings(preset="qwen3-tiny"),
            rl=RlSettings(prompts_per_step=life.per_step, minibatch_prompts=life.per_step),
            rollout=RolloutSettings(responses_per_prompt=2, max_response_tokens=32),
            scheduling=SchedulingSettings(mode=life.mode, order=life.order, max_staleness=2, keep_steps=1),
        )
        return SimpleNamespace(
            saved_step=0 if self.checkpoint is None else self.checkpoint["step"],
            settings=settings, context=self.context, root=self.root, resumed=self.checkpoint, total_steps=life.total,
            step=0 if self.checkpoint is None else self.checkpoint["step"], arch=SimpleNamespace(vocab_size=1000),
            noted={},
            chat=SimpleNamespace(stop_ids=(7,), opening=""), heartbeat=SimpleNamespace(renew=lambda: None),
            phase=lambda name, total=None: contextlib.nullcontext(lambda count=1: None),
            stop_if_asked=lambda: None,
        )  # fmt: skip


def drawn(prompt: Prompt, step: int) -> RolloutGroup:
    ids = np.array([5, 7], dtype=np.int64)
    rollout = Rollout(
        response_ids=ids, rollout_logprobs=np.zeros(2, dtype=np.float32), finish_reason="stop",
        policy_versions=((step - 1, 2),),
    )  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=(rollout, rollout))


def graded(group: RolloutGroup) -> ScoredGroup:
    return scored_group(group, (RIGHT,) * len(group.rollouts), normalize_std=True)


def local(**changed: Any) -> Life:
    """A life whose training processes generate."""
    return Life(**{"served": False, "mode": "sync", **changed})


COMPLETION: dict[str, Any] = {"mode": "async", "order": "completion"}
KILLED, STOPPED = Life(killed_in=9), Life(stopped_at=6)
"""Killed after checkpoint 5, and asked to stop while it trains what the killed life had reserved."""
CASES = {
    "undisturbed": [Life()],
    "killed": [KILLED, Life()],
    "killed and stopped early": [KILLED, STOPPED, Life()],
    "killed before any checkpoint": [Life(killed_in=3), Life(stopped_at=2), Life()],
    "synchronous": [Life(killed_in=9, mode="sync"), Life(stopped_at=6, mode="sync"), Life(mode="sync")],
    "by completion": [
        Life(killed_in=9, mode="async", order="completion"),
        Life(stopped_at=6, mode="async", order="completion"),
        Life(mode="async", order="completion"),
    ],
    "ledger lost": [KILLED, Life(stopped_at=11, loses_ledger=True), Life()],
    "ledger lost, by completion": [
        Life(killed_in=9, mode="async", order="completion"),
        Life(stopped_at=11, mode="async", order="completion", loses_ledger=True),
        Life(mode="async", order="completion"),
    ],
    "fewer prompts a step": [
        Life(killed_in=2, per_step=8, every=1), Life(stopped_at=2, per_step=4, every=1), Life(per_step=4)
    ],
    "fewer prompts a step, by completion": [
        Life(killed_in=2, per_step=8, every=1, mode="sync", order="completion"),
        Life(stopped_at=2, per_step=4, every=1, mode="sync", order="completion"),
        Life(per_step=4, mode="sync", order="completion"),
    ],
    "fewer steps and then more": [KILLED, Life(total=6), Life()],
    "from synchronous to ahead": [
        Life(killed_in=9, mode="sync"), Life(stopped_at=6, mode="sync"), Life(mode="async")
    ],
    "more prompts over several epochs": [Life(per_step=16, stopped_at=8), Life(per_step=9, total=24), Life(total=40)],
    "on without servers": [Life(stopped_at=4), Life(served=False, mode="sync", stopped_at=9), Life()],
    "on without servers, killed": [
        Life(stopped_at=4), Life(served=False, mode="sync", killed_in=6), Life(served=False, mode="sync")
    ],
}  # fmt: skip
LOCAL_CASES = {
    "undisturbed": [local()],
    "killed": [local(killed_in=9), local()],
    "killed and stopped early": [local(killed_in=9), local(stopped_at=6), local()],
    "killed and stopped early again and again": [
        local(killed_in=9), local(stopped_at=6), local(killed_in=9), local(stopped_at=7), local(killed_in=14),
        local(stopped_at=11), local(),
    ],
    "killed before any checkpoint": [local(killed_in=3), local(stopped_at=2), local()],
    "fewer steps and then more": [local(killed_in=9), local(total=6), local()],
    "an older checkpoint": [local(total=14), local(falls_back=True, stopped_at=11), local()],
    "an older checkpoint, killed": [local(total=14), local(falls_back=True, killed_in=12), local(stopped_at=11),
                                    local()],
    "over the border of an epoch": [
        local(per_step=16, killed_in=8), local(per_step=16, stopped_at=6), local(per_step=16, killed_in=9),
        local(per_step=16, stopped_at=7), local(per_step=16),
    ],
    "ledger lost": [local(killed_in=9), local(stopped_at=6, loses_ledger=True), local()],
}  # fmt: skip
MIXED_CASES = {
    "other prompts a step": [
        local(per_step=16, killed_in=9), local(per_step=9, stopped_at=6), local(per_step=16, killed_in=9),
        local(per_step=4, stopped_at=7), local(per_step=16, total=40),
    ],
    "from local to servers": [local(killed_in=9), Life(stopped_at=6), Life()],
    "from local to servers, early": [local(killed_in=9), local(stopped_at=6), Life()],
    "from local to servers and back": [local(killed_in=9), Life(stopped_at=6), local(stopped_at=7), Life(), ],
    "from servers to local": [KILLED, local(stopped_at=6), local()],
    "from servers to local, killed": [KILLED, local(killed_in=8), local(stopped_at=6), Life(killed_in=9), local()],
    "by completion, from servers to local": [
        Life(killed_in=9, **COMPLETION), local(stopped_at=6, order="completion"), local(order="completion")
    ],
    "by completion, from servers to local and back": [
        Life(killed_in=9, **COMPLETION), local(killed_in=8, order="completion"), Life(stopped_at=6, **COMPLETION),
        local(stopped_at=8, order="completion"), Life(**COMPLETION),
    ],
}  # fmt: skip


@pytest.mark.parametrize("lives", LOCAL_CASES.values(), ids=LOCAL_CASES.keys())
def test_steps_that_the_trainer_generates_are_those_of_a_run_that_nothing_disturbed(
    context: ParallelContext, tmp_path: Path, lives: list[Life]
) -> None:
    undisturbed = Run(tmp_path / "undisturbed", context)
    undisturbed.live(local(per_step=lives[-1].per_step))
    run = Run(tmp_path / "run", context)
    for life in lives:
        run.live(life)
    assert run.trained == undisturbed.trained


ALL_CASES = CASES | {f"local, {name}": lives for name, lives in LOCAL_CASES.items()} | MIXED_CASES


@pytest.mark.parametrize("lives", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_every_prompt_is_trained_once_and_none_is_left_out(
    context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[Life]
) -> None:
    monkeypatch.setattr(managed, "_POLL_SECONDS", 1.0)
    run = Run(tmp_path, context)
    for life in lives:
        run.live(life)
    steps = lives[-1].total
    assert sorted(run.trained) == list(range(1, steps + 1))
    trained = [key for step in range(1, steps + 1) for key in run.trained[step]]
    assert len(trained) == len(set(trained)), "a prompt was trained twice in one epoch"
    # None is left behind: of each epoch but the last two, every prompt; of the walk, all but what is drawn ahead.
    whole = max(epoch for epoch, _ in trained) - 1
    for epoch in range(whole):
        assert {prompt for e, prompt in trained if e == epoch} == {prompt.prompt_id for prompt in PROMPTS}
    cursor = DataCursor(ROWS, 1, seed=3, fingerprint="data")
    walk = [(i // ROWS, PROMPTS[int(cursor.next_batch()[0])].prompt_id) for i in range(len(trained) + 3 * 16 + ROWS)]
    last = max(walk.index(key) for key in set(trained))
    assert last < len(trained) + 3 * max(life.per_step for life in lives), (
        "prompts far ahead were trained before others"
    )
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert reader.trained_not_once() == []
