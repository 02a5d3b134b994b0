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
from megatron_klear.observe.metrics import MetricsWriter, read_metrics
from megatron_klear.session import evaluation
from megatron_klear.session.rollouts import Accuracy


@pytest.fixture
def context():
    yield parallel.start(ParallelSettings())
    parallel.stop()
    assert not dist.is_initialized()


class Engines:
    """Stands in for `Rollouts`: notes what is evaluated, and when the trainer gets its memory back."""

    def __init__(self):
        self.evaluated, self.handed, self.count = [], [], 4
        self.is_stopped = False
        self.engine = SimpleNamespace(policy_version=-1)

    def publish(self, version):
        self.engine.policy_version = version

    def evaluate(self, prompts, settings, *, step):
        if self.is_stopped:
            return None
        self.evaluated.append(step)
        return Accuracy(mean=0.25 if self.count else math.nan, stderr=0.0, count=self.count, groups=())

    def failed_requests(self):
        return {"requests/failed": 2.0}

    def hand_to_trainer(self):
        if not self.is_stopped:
            self.handed.append(len(self.evaluated))

    def examples(self, groups, step):
        return []

    def __exit__(self, *_):
        pass


@pytest.fixture
def engines(monkeypatch):
    found = Engines()
    monkeypatch.setattr(evaluation, "Rollouts", lambda session: found)
    return found


def session_of(root, context, settings: EvaluationSettings, *, step: int, was_done: bool = False, stopped_before=None):
    return SimpleNamespace(
        entry="sft",
        step=step,
        was_done=was_done,
        root=root,
        context=context,
        settings=SimpleNamespace(
            evaluation=settings, generates=lambda entry: entry == "rl", needs_engine=lambda entry: True
        ),
        set_aside_phases=contextlib.nullcontext,
        metrics=MetricsWriter(root, tensorboard=False, resume_step=step or None),
        progress=SimpleNamespace(update=lambda _: None, note=lambda _: None),
        keep_examples=lambda *_: None,
        stop_if_asked=lambda before=None: stopped_before.append(before) if stopped_before is not None else None,
    )


@pytest.fixture
def evaluated(tmp_path, context, engines):
    """Ends a run at a step; returns how often that evaluated."""

    def end(step: int, *, was_done: bool, count: int = 4) -> int:
        before, engines.count = len(engines.evaluated), count
        session = session_of(tmp_path, context, EvaluationSettings(), step=step, was_done=was_done)
        evaluation.Evaluation(session, SimpleNamespace(prompts=())).at_end()
        session.metrics.close()
        # Fine-tuning goes on after an evaluation, and wants back what the engines have of its memory.
        assert engines.handed == list(range(1, len(engines.evaluated) + 1))
        return len(engines.evaluated) - before

    return end


@pytest.fixture
def due(tmp_path, context, engines):
    """Runs so many steps; returns the steps that were evaluated."""

    def run(settings: EvaluationSettings, *, steps: int) -> list[int]:
        session = session_of(tmp_path, context, settings, step=0)
        session.total_steps = steps
        with evaluation.Evaluation(session, SimpleNamespace(prompts=())) as made:
            made.at_start()
            for step in range(1, steps + 1):
                made.when_due(step)
                session.step = step
            made.at_end()
        session.metrics.close()
        assert [step for step, _ in rows(tmp_path)] == engines.evaluated
        return engines.evaluated

    return run


def told(tmp_path) -> dict:
    return json.loads((tmp_path / "result.json").read_text())


def test_a_finished_run_is_evaluated_once(evaluated, tmp_path):
    assert evaluated(4, was_done=False) == 1
    assert told(tmp_path) == {"entry": "sft", "step": 4, "accuracy": 0.25, "stderr": 0.0, "count": 4}
    assert evaluated(4, was_done=True) == 0


def rows(tmp_path) -> list[tuple[int, float]]:
    return [(row["step"], row["accuracy/heldout"]) for row in read_metrics(tmp_path) if row["phase"] == "eval"]


@pytest.mark.parametrize("left", [None, "{"])  # as a kill may leave it on a bad disk
@pytest.mark.parametrize("count", [4, 0])
def test_a_run_killed_after_its_last_save_is_evaluated_and_logged_once(evaluated, tmp_path, left, count):
    assert evaluated(4, was_done=True, count=count) == 1
    before = told(tmp_path)
    (tmp_path / "result.json").unlink()
    if left is not None:
        (tmp_path / "result.json").write_text(left)
    # Killed between the log and result.json: the figures are there, and are not worked out again.
    assert evaluated(4, was_done=True, count=count) == 0
    assert told(tmp_path) == before
    assert [step for step, _ in rows(tmp_path)] == [4]
    # Killed before the log: nothing is there.
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert evaluated(4, was_done=True, count=count) == 1
    assert told(tmp_path) == before


@pytest.mark.parametrize(
    ("every", "at_end", "expected"),
    [(2, True, [0, 2, 4]), (2, False, [0, 2, 4]), (3, False, [0, 3]), (3, True, [0, 3, 4]), (0, True, [4]),
     (0, False, []), (9, False, [0])],
)  # fmt: skip
def test_an_evaluation_is_made_every_so_many_steps_the_last_one_included(due, every, at_end, expected):
    assert due(EvaluationSettings(every_steps=every, at_end=at_end), steps=4) == expected


def test_an_evaluation_that_a_stop_came_before_is_made_by_the_next_life(tmp_path, context, engines):
    for step in (3, 4, 4):  # the third life finds it in the log
        session = session_of(tmp_path, context, EvaluationSettings(every_steps=2), step=step)
        evaluation.Evaluation(session, SimpleNamespace(prompts=())).at_start()
        session.metrics.close()
    assert engines.evaluated == [4]


def test_answers_are_written_by_the_first_rank_before_the_figures_are_logged(tmp_path, context, engines):
    notes, written = [], []

    def evaluate(step, *, is_first=True):
        def write(of, groups, at):
            written.append((of, groups, at, len(rows(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0))
            if step == 2:
                raise OSError(28, "No space left on device")

        session = session_of(tmp_path, context, EvaluationSettings(every_steps=1), step=step)
        session.total_steps, session.is_first = 9, is_first
        session.progress.note = notes.append
        evaluation.Evaluation(session, SimpleNamespace(prompts=()), write).when_due(step)
        session.metrics.close()
        return session

    first, second = evaluate(1), evaluate(2)
    evaluate(3, is_first=False)
    assert written == [(first, (), 1, 0), (second, (), 2, 1)]
    # What cannot be written is told, and ends nothing.
    assert [note for note in notes if "cannot be written" in note] == [
        "step 2: the answers of the evaluation cannot be written: OSError: [Errno 28] No space left on device"
    ]
    assert [step for step, _ in rows(tmp_path)] == [1, 2, 3]


def test_the_result_of_fewer_steps_does_not_stand_for_more(evaluated, tmp_path):
    assert evaluated(4, was_done=False) == 1
    assert evaluated(6, was_done=True) == 1  # killed after saving step 6, before evaluating it
    assert told(tmp_path)["step"] == 6


def test_no_graded_answer_is_no_accuracy(evaluated, tmp_path):
    assert evaluated(4, was_done=False, count=0) == 1
    assert math.isnan(rows(tmp_path)[0][1])
    assert told(tmp_path)["accuracy"] is None


@pytest.mark.parametrize("at_end", [True, False])
def test_an_evaluation_that_gives_way_to_a_stop_is_neither_logged_nor_held_for_made(tmp_path, context, engines, at_end):
    """As `Rollouts.evaluate` gives None; what a life left out the next one makes."""
    every = EvaluationSettings(every_steps=2, at_end=at_end)
    engines.is_stopped = True
    for step in (2, 4):
        stops = []
        session = session_of(tmp_path, context, every, step=step - 1, stopped_before=stops)
        session.total_steps = 4
        life = evaluation.Evaluation(session, SimpleNamespace(prompts=()))
        life.when_due(step)
        assert stops == []
        session.step = step
        if step == 4:  # else the step that is finished now is the last one of this life
            life.at_end()
            assert set(stops) == {"the last evaluation"}
        session.metrics.close()
    assert rows(tmp_path) == []
    assert not (tmp_path / "result.json").exists()

    engines.is_stopped = False
    for step in (2, 4):
        session = session_of(tmp_path, context, every, step=step, was_done=step == 4)
        session.total_steps = 4
        life = evaluation.Evaluation(session, SimpleNamespace(prompts=()))
        life.at_start()
        if step == 4:
            life.at_end()
        session.metrics.close()
    assert [step for step, _ in rows(tmp_path)] == engines.evaluated == [2, 4]
    assert (tmp_path / "result.json").exists() == at_end
