"""Accuracy on held-out problems: when it is due, what it logs, and the engine that answers."""

from __future__ import annotations

import json
from functools import partial
from types import TracebackType
from typing import Self

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.data import PromptData
from megatron_klear.observe import names
from megatron_klear.observe.replace import replace_file
from megatron_klear.session.rollouts import Accuracy, Rollouts
from megatron_klear.session.session import Session

RESULT_FILE = "result.json"


class Evaluation:
    """Owns the run's engine and graders, and evaluates on held-out problems where there are any.

    Args:
        session: the run.
        heldout: problems that are never trained on; None evaluates nothing.
    """

    def __init__(self, session: Session, heldout: PromptData | None) -> None:
        self.session = session
        self.heldout = heldout
        # SFT without held-out problems needs no engine at all.
        needed = heldout is not None or session.entry == "rl"
        self._rollouts = Rollouts(session) if needed else None
        self._last_step: int | None = None

    @property
    def rollouts(self) -> Rollouts:
        """The engine and graders of this run."""
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
        """Evaluate the weights that a fresh run starts from, when evaluations during training are on."""
        if self.session.step == 0 and self.session.settings.evaluation.every_steps:
            self._evaluate(0)

    def when_due(self, step: int) -> None:
        """Evaluate every `evaluation.every_steps` steps."""
        every = self.session.settings.evaluation.every_steps
        if every and step % every == 0 and step < self.session.total_steps:
            self._evaluate(step)

    def at_end(self) -> None:
        """Evaluate the final weights and write the result to `result.json`."""
        if not self.session.settings.evaluation.at_end or self.heldout is None:
            return
        if self.session.was_done and agree("read result.json", self._is_told, self.session.context):
            return  # the run was finished before it was started again
        accuracy = self._evaluate(self.session.step)
        if accuracy is None:
            return
        result = {
            "entry": self.session.entry,
            "step": self.session.step,
            "accuracy": accuracy.mean if accuracy.count else None,
            "stderr": accuracy.stderr,
            "count": accuracy.count,
        }
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

    def _evaluate(self, step: int) -> Accuracy | None:
        if self.heldout is None or step == self._last_step:
            return None
        self._last_step = step
        with self.session.set_aside_phases():
            published = self.rollouts.engine.policy_version
            if published < step or self.session.entry == "sft":
                self.rollouts.publish(version=step if published < 0 else published + 1)
            accuracy = self.rollouts.evaluate(self.heldout.prompts, self.session.settings.evaluation, step=step)
            if self.session.entry == "sft":  # which trains next; RL first generates what it trains on
                self.rollouts.hand_to_trainer()
        values = {
            names.ACCURACY_HELDOUT: accuracy.mean,
            names.ACCURACY_HELDOUT_COUNT: accuracy.count,
            names.ACCURACY_HELDOUT_STDERR: accuracy.stderr,
        }
        self.session.metrics.log(step, "eval", values)
        self.session.progress.update(values)
        self.session.progress.note(
            f"step {step}: held-out accuracy {accuracy.mean:.3f} +- {accuracy.stderr:.3f} (n={accuracy.count})"
        )
        self.session.keep_examples(self.rollouts.examples(accuracy.groups, step), step)
        return accuracy
