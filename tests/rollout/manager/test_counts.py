"""What the manager tells of its engines and requests, under the names of the metrics, while a trainer takes steps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_klear.config import SchedulingSettings
from megatron_klear.observe import names
from megatron_klear.records import Prompt
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger
from megatron_klear.rollout.manager import RolloutManager, Sampling
from megatron_klear.rollout.simulation import SimulatedEngine
from tests.rollout.manager.conftest import grade

PROMPTS = [Prompt(prompt_id=f"p{i}", domain="math", token_ids=np.array([1, 2]), reference="") for i in range(2)]


def test_failures_malformed_answers_and_lost_engines_are_counted(tmp_path: Path) -> None:
    engines = [
        SimulatedEngine(f"engine {i}", remaining=lambda _: 6, seconds_per_token=0.001, report_seconds=0.01)
        for i in range(2)
    ]
    left = [2]

    def without_logprobs(part):
        left[0] -= 1
        return replace(part, logprobs=part.logprobs[:-1]) if left[0] >= 0 else part

    engines[0].corrupt = without_logprobs
    engines[1].fail_next(1)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, stop_token_ids=(7,))
    with (
        Ledger(tmp_path / "ledger.sqlite") as ledger,
        RolloutManager(
            engines,
            ledger,
            settings=SchedulingSettings(stall_seconds=0.4),
            sampling=Sampling(params=params, num_responses=8, seed=1, vocab_size=1000),
            groups_per_step=1,
            grade=grade,
            version=0,
            next_step=1,
        ) as manager,
    ):
        assert set(manager.counts()) <= set(names.METRICS)
        assert {name: value for name, value in manager.counts().items() if value} == {names.ENGINES_SERVING: 2.0}
        manager.submit([(0, PROMPTS[0])])
        assert manager.take(1, 1, timeout=30.0) is not None
        counts = manager.counts()
        # Eight responses, and three requests again: two for answers that lack a log-probability, one for an error.
        assert {name: value for name, value in counts.items() if value} == {
            names.REQUESTS_SENT: 11.0,
            names.REQUESTS_FAILED: 3.0,
            names.REQUESTS_MALFORMED: 2.0,
            names.ENGINES_SERVING: 2.0,
        }
        manager.trained(1, saved_step=0)
        manager.pause_for_publish()
        engines[0].version = 1  # the other one missed the publish
        manager.resume(1)
        counts = manager.counts()
        assert (counts[names.ENGINES_SERVING], counts[names.ENGINES_LOST]) == (1.0, 1.0)
        engines[1].version = 1
        deadline = time.monotonic() + 30.0
        while manager.counts()[names.ENGINES_REJOINED] < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        counts = manager.counts()
        assert (counts[names.ENGINES_SERVING], counts[names.ENGINES_REJOINED]) == (2.0, 1.0)
