"""What a step without the manager takes from the ledger of an earlier life, and what it draws anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_klear import parallel
from megatron_klear.config import (
    ModelSettings,
    ParallelSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.records import ParallelContext, Prompt, ScoredGroup
from megatron_klear.rollout.ledger import LEDGER_FILE, Ledger, LedgerReader
from megatron_klear.session.ledger import RunLedger

STEP = 3
"""The step to train; its responses must be sampled by weights of version 2."""

FOUND: dict[str, tuple[tuple[int, int], ...]] = {
    "current": ((2, 4),),
    "older": ((1, 4),),
    "continued": ((1, 2), (2, 2)),
}
"""Prompts that an asynchronous life of the run has left graded, and the versions of their tokens."""


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


class Data:
    """Prompts in the order of the walk."""

    fingerprint = "data"

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)


def test_only_responses_of_the_weights_before_the_step_are_recalled(
    context: ParallelContext, make_group: Callable[..., ScoredGroup], tmp_path: Path
) -> None:
    groups = {name: make_group(name, [1, -1], lengths=[4, 4]) for name in (*FOUND, "missing")}
    fresh = {
        name: replace(
            g, group=replace(g.group, rollouts=tuple(replace(r, policy_versions=((2, 4),)) for r in g.group.rollouts))
        )
        for name, g in groups.items()
    }
    with Ledger(tmp_path / LEDGER_FILE) as ledger:
        for name, versions in FOUND.items():
            [group_id] = ledger.reserve([(0, groups[name].group.prompt)], num_responses=2)
            for index, rollout in enumerate(groups[name].group.rollouts):
                logprobs = rollout.rollout_logprobs - 1.0  # so that what is drawn anew can be told from it
                kept = replace(rollout, policy_versions=versions, rollout_logprobs=logprobs)
                ledger.save_response(group_id, index, kept)
            ledger.save_grades(group_id, groups[name].grades)
    settings = Settings(
        run=RunSettings(dir=str(tmp_path)),
        tokenizer=TokenizerSettings(dir="tokenizer"),
        model=ModelSettings(preset="qwen3-tiny"),
        rl=RlSettings(prompts_per_step=4, minibatch_prompts=4),
        rollout=RolloutSettings(responses_per_prompt=2),
    )
    session = SimpleNamespace(settings=settings, context=context, root=tmp_path, resumed=None, step=STEP - 1)
    prompts = Data([group.group.prompt for group in groups.values()])
    drawn: list[str] = []

    def generate(missing: list[Prompt], *, step: int) -> list[Prompt]:
        assert step == STEP
        drawn.extend(prompt.prompt_id for prompt in missing)
        return missing

    rollouts = SimpleNamespace(generate=generate, score=lambda missing, mine: [fresh[p.prompt_id] for p in mine])
    cursor = SimpleNamespace(rows_taken=0, next_batch=lambda: range(4))
    with RunLedger(session, prompts) as source:  # type: ignore[arg-type]
        step = source.groups(STEP, cursor, rollouts)  # type: ignore[arg-type]
    assert drawn == ["older", "continued", "missing"]
    assert [group.group.prompt.prompt_id for group in step] == list(groups)
    for group in step:
        name = group.group.prompt.prompt_id
        assert {r.policy_versions for r in group.group.rollouts} == {((2, 4),)}, name
        before = groups[name].group.rollouts[0].rollout_logprobs - (1.0 if name == "current" else 0.0)
        assert group.group.rollouts[0].rollout_logprobs.tobytes() == before.tobytes()
    with LedgerReader(tmp_path / LEDGER_FILE) as reader:
        assert {group.oldest_version for group in reader.groups_of_step(STEP)} == {STEP - 1}
        assert [event for _, event, *_ in reader.events()].count("drawn again") == 2
