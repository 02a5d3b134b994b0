"""The final evaluation is made once for every last step that a run has had."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.config import EvaluationSettings, ParallelSettings
from megatron_klear.session import evaluation
from megatron_klear.session.rollouts import Accuracy


@pytest.fixture
def context():
    yield parallel.start(ParallelSettings())
    parallel.stop()
    assert not dist.is_initialized()


@pytest.fixture
def evaluated(tmp_path, context, monkeypatch):
    """Ends a run at a step; returns how often that evaluated."""
    calls, handed = [], []

    def end(step: int, *, was_done: bool, count: int = 4) -> int:
        before = len(calls)

        class Rollouts:
            engine = SimpleNamespace(policy_version=step)

            def __init__(self, session):
                pass

            def publish(self, version):
                pass

            def evaluate(self, prompts, settings, *, step):
                calls.append(step)
                mean = 0.25 if count else math.nan
                return Accuracy(mean=mean, stderr=0.0, count=count, groups=())

            def hand_to_trainer(self):
                handed.append(len(calls))

            def examples(self, groups, step):
                return []

        monkeypatch.setattr(evaluation, "Rollouts", Rollouts)
        session = SimpleNamespace(
            entry="sft",
            step=step,
            was_done=was_done,
            root=tmp_path,
            context=context,
            settings=SimpleNamespace(evaluation=EvaluationSettings()),
            set_aside_phases=contextlib.nullcontext,
            metrics=SimpleNamespace(log=lambda *_: None),
            progress=SimpleNamespace(update=lambda _: None, note=lambda _: None),
            keep_examples=lambda *_: None,
        )
        evaluation.Evaluation(session, SimpleNamespace(prompts=())).at_end()
        # Fine-tuning goes on after an evaluation, and wants back what the engines have of its memory.
        assert handed == list(range(1, len(calls) + 1))
        return len(calls) - before

    return end


def told(tmp_path) -> dict:
    return json.loads((tmp_path / "result.json").read_text())


def test_a_finished_run_is_evaluated_once(evaluated, tmp_path):
    assert evaluated(4, was_done=False) == 1
    assert told(tmp_path) == {"entry": "sft", "step": 4, "accuracy": 0.25, "stderr": 0.0, "count": 4}
    assert evaluated(4, was_done=True) == 0


def test_a_run_killed_after_its_last_save_is_evaluated_when_started_again(evaluated, tmp_path):
    assert evaluated(4, was_done=True) == 1
    (tmp_path / "result.json").write_text("{")  # as a kill may leave it on a bad disk
    assert evaluated(4, was_done=True) == 1


def test_the_result_of_fewer_steps_does_not_stand_for_more(evaluated, tmp_path):
    assert evaluated(4, was_done=False) == 1
    assert evaluated(6, was_done=True) == 1  # killed after saving step 6, before evaluating it
    assert told(tmp_path)["step"] == 6


def test_no_graded_answer_is_no_accuracy(evaluated, tmp_path):
    assert evaluated(4, was_done=False, count=0) == 1
    assert told(tmp_path)["accuracy"] is None
