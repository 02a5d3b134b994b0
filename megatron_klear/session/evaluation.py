"""Accuracy on held-out problems: when it is due, what it logs, and the engine that answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import PromptData
from megatron_klear.observe import names
from megatron_klear.observe.metrics import read_metrics
from megatron_klear.observe.replace import replace_file
from megatron_klear.records import ScoredGroup
from megatron_klear.session.recorded import Recorded
from megatron_klear.session.rollouts import Accuracy, Rollouts
from megatron_klear.session.session import Session

RESULT_FILE = "result.json"

Write = Callable[[Session, Sequence[ScoredGroup], int], None]
"""Writes what was answered and graded at a step into files, for people to read."""


class Evaluation:
    """Owns the run's engine and graders, and evaluates on held-out problems where there are any.

    There is an engine where the run generates or evaluates: fine-tuning and a replay of recorded responses
    (`scheduling.replay_from`) have one for evaluations only, and none where there are no evaluations.

    Args:
        session: the run.
        heldout: problems that are never trained on; None evaluates nothing.
        write: called by the first rank with every evaluation. A failure is told and ends nothing.
    """

    def __init__(self, session: Session, heldout: PromptData | None, write: Write | None = None) -> None:
        self.session = session
        self._write_answers = write
        self.heldout = heldout
        self._is_generating = session.settings.generates(session.entry)
        self._rollouts = Rollouts(session) if session.settings.needs_engine(session.entry) else None
        self._last_step: int | None = None
        self._gave_way = False

    @property
    def rollouts(self) -> Rollouts | Recorded:
        """What brings the responses that are trained on."""
        return self._engine if self._is_generating else Recorded(self.session)

    @property
    def _engine(self) -> Rollouts:
        assert self._rollouts is not None
        return self._rollouts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rollouts is not None:
            self._rollouts.__exit__(kind, error, trace)

    def at_start(self) -> None:
        """Evaluate the weights that a run starts from, when evaluations during training are on.

        Of a resumed run, if they are due at the step that it goes on from and are not in its log: an earlier life was
        asked to stop before it could. Those of its last step are left to `at_end`, where that evaluates.
        """
        session, every = self.session, self.session.settings.evaluation.every_steps
        is_left = session.was_done and session.settings.evaluation.at_end
        if not every or self.heldout is None or is_left or session.step % every:
            return
        if session.step == 0 or agree("read the figures that were logged", self._logged, session.context) is None:
            self._evaluate(session.step)
            session.stop_if_asked()

    def when_due(self, step: int) -> None:
        """Evaluate every `evaluation.every_steps` steps; the last step is left to `at_end`, where that evaluates."""
        evaluation = self.session.settings.evaluation
        is_last = step >= self.session.total_steps
        if evaluation.every_steps and step % evaluation.every_steps == 0 and not (is_last and evaluation.at_end):
            self._evaluate(step)

    def at_end(self) -> None:
        """Evaluate the final weights and write the result to `result.json`.

        Where an earlier start was killed between logging the figures and writing them there, they are taken from the
        log: a step is evaluated and logged once.
        """
        if self._gave_way:  # in the last step, after which nothing else would end this life
            self.session.stop_if_asked(before="the last evaluation")
        if not self.session.settings.evaluation.at_end or self.heldout is None:
            return
        figures: dict[str, Any] | None = None
        if self.session.was_done:
            if agree("read result.json", self._is_told, self.session.context):
                return  # the run was finished before it was started again
            figures = agree("read the figures that were logged", self._logged, self.session.context)
        if figures is None:
            accuracy = self._evaluate(self.session.step)
            if accuracy is None:
                self.session.stop_if_asked(before="the last evaluation")
                return
            mean = accuracy.mean if accuracy.count else None
            figures = {"accuracy": mean, "stderr": accuracy.stderr, "count": accuracy.count}
        result = {"entry": self.session.entry, "step": self.session.step, **figures}
        text = json.dumps(result, indent=1) + "\n"
        write = partial(replace_file, self.session.root / RESULT_FILE, text)
        together("write the result of the run", write, self.session.context, only_first=True)

    def _is_told(self) -> bool:
        """Whether `result.json` is of the run's last step; more steps may have been asked for since it was written."""
        try:
            told = json.loads((self.session.root / RESULT_FILE).read_text(encoding="utf-8"))
            return bool(told["step"] == self.session.step)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _logged(self) -> dict[str, Any] | None:
        """Figures of the run's last step as metrics.jsonl has them; None where it was not evaluated."""
        try:
            rows = read_metrics(self.session.root)
        except OSError:
            return None
        for row in reversed(rows):
            if row["phase"] == "eval" and row["step"] == self.session.step:
                mean, count = row[names.ACCURACY_HELDOUT], int(row[names.ACCURACY_HELDOUT_COUNT])
                stderr = row[names.ACCURACY_HELDOUT_STDERR]
                return {"accuracy": mean if count else None, "stderr": stderr, "count": count}
        return None

    def _evaluate(self, step: int) -> Accuracy | None:
        if self.heldout is None or step == self._last_step:
            return None
        self._last_step = step
        engine = self._engine
        with self.session.set_aside_phases():
            published = engine.engine.policy_version
            if published < step or not self._is_generating:
                engine.publish(version=step if published < 0 else published + 1)
            accuracy = engine.evaluate(self.heldout.prompts, self.session.settings.evaluation, step=step)
            if not self._is_generating:  # training is next; where an engine generates, that comes first
                engine.hand_to_trainer()
        if accuracy is None:  # the run is asked to stop: its next life evaluates (`at_start`, `at_end`)
            self._last_step, self._gave_way = None, True
            return None
        self._keep_answers(accuracy, step)
        values = {
            names.ACCURACY_HELDOUT: accuracy.mean,
            names.ACCURACY_HELDOUT_COUNT: accuracy.count,
            names.ACCURACY_HELDOUT_STDERR: accuracy.stderr,
            **engine.failed_requests(),
        }
        self.session.metrics.log(step, "eval", values)
        self.session.progress.update(values)
        self.session.progress.note(
            f"step {step}: held-out accuracy {accuracy.mean:.3f} +- {accuracy.stderr:.3f} (n={accuracy.count})"
        )
        self.session.keep_examples(engine.examples(accuracy.groups, step), step)
        return accuracy

    def _keep_answers(self, accuracy: Accuracy, step: int) -> None:
        """Before the figures are logged: what a kill in between leaves is made again, and not missing."""
        if self._write_answers is None or not self.session.is_first:
            return
        try:
            self._write_answers(self.session, accuracy.groups, step)
        except Exception as error:
            self.session.progress.note(
                f"step {step}: the answers of the evaluation cannot be written: {type(error).__name__}: {error}"
            )
