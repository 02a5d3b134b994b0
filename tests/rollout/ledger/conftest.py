"""Ledgers in a temporary directory, and prompts and responses to put into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_klear.records import Grade, Prompt, Rollout
from megatron_klear.rollout.ledger import Ledger, Terms
from megatron_klear.rollout.ledger.terms import enforce


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(file: Path) -> Iterator[Ledger]:
    """Of a run that began under no settings in particular."""
    with Ledger(file) as ledger:
        enforce(ledger, Terms(), step=0, num_responses=2)
        yield ledger


@pytest.fixture
def make_prompt() -> Callable[..., Prompt]:
    def make(name: str, length: int = 5) -> Prompt:
        tokens = np.arange(length, dtype=np.int64) + len(name)
        return Prompt(prompt_id=name, domain="math", token_ids=tokens, reference="4", text=f"text of {name}")

    return make


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    """A response whose tokens are sampled from the given (version, tokens) runs."""

    def make(*versions: tuple[int, int], finish: str = "stop", seed: int = 0) -> Rollout:
        length = sum(count for _, count in versions)
        rng = np.random.default_rng(seed)
        return Rollout(
            response_ids=rng.integers(0, 150_000, length),
            rollout_logprobs=-rng.exponential(size=length).astype(np.float32),
            finish_reason=finish,
            policy_versions=versions,
        )

    return make


@pytest.fixture
def advance(make_prompt, make_rollout) -> Callable[..., int]:
    """Bring a new group of two responses to a state: `advance(ledger, "p1", "graded", version=3)`."""

    def go(ledger: Ledger, name: str, state: str, *, version: int = 0, step: int = 1, epoch: int = 0) -> int:
        [group] = ledger.reserve([(epoch, make_prompt(name))], num_responses=2)
        if state == "reserved":
            return group
        for index in range(2):
            ledger.save_response(group, index, make_rollout((version, 4 + index), seed=index))
        if state == "generated":
            return group
        ledger.save_grades(group, [Grade(outcome="correct", reward=1.0), Grade(outcome="wrong", reward=-1.0)])
        if state == "graded":
            return group
        ledger.commit(step, [group])
        if state == "trained":
            ledger.trained(step)
        return group

    return go
