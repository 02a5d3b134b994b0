"""Seeds of what is drawn without the manager: another one for every run, step, use, prompt and response."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_klear.rollout.manager.work import response_seed as managed_seed
from megatron_klear.rollout.sglang.engine import response_seed as served_seed
from megatron_klear.session.rollouts import _seed


def session(seed: int) -> Any:
    return SimpleNamespace(settings=SimpleNamespace(run=SimpleNamespace(seed=seed)))


def test_a_prompt_that_comes_again_in_another_step_or_an_evaluation_has_other_seeds() -> None:
    seeds = {
        served_seed(_seed(session(run), step, use), prompt, index)
        for run in (0, 1)
        for step in range(50)
        for use in (0, 1)
        for prompt in ("p", "q")
        for index in range(4)
    }
    assert len(seeds) == 2 * 50 * 2 * 2 * 4
    assert _seed(session(1), 7, 0) == _seed(session(1), 7, 0), "the same when a step is drawn again after a kill"


def test_a_prompt_that_comes_again_in_another_epoch_has_other_seeds_with_the_manager() -> None:
    seeds = {managed_seed(run, e, prompt, i) for run in (0, 1) for e in range(50) for prompt in "pq" for i in range(4)}
    assert len(seeds) == 2 * 50 * 2 * 4
