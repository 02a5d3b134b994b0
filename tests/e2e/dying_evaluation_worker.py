"""train_rl that is killed in the middle of the evaluation of a step, once: responses are there, grades are not.

KLEAR_DIE_AT=STEP python dying_evaluation_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import os
import signal
from typing import Any

from megatron_klear import train_rl
from megatron_klear.session.launch import leave, run_entry
from tests.e2e import stand_in_worker


def main(settings: Any, stop: Any) -> None:
    from megatron_klear.session.rollouts import Rollouts

    evaluate, score = Rollouts.evaluate, Rollouts.score
    evaluated: list[int] = []

    def noted(self: Rollouts, prompts: Any, settings: Any, *, step: int) -> Any:
        evaluated.append(step)
        return evaluate(self, prompts, settings, step=step)

    def dying(self: Rollouts, prompts: Any, mine: Any) -> Any:
        mark = self.session.root / "was_killed"
        if evaluated and evaluated[-1] == int(os.environ["KLEAR_DIE_AT"]) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, prompts, mine)

    Rollouts.evaluate, Rollouts.score = noted, dying  # type: ignore[method-assign]
    entry = stand_in_worker if settings.rollout.engine == "sglang" else train_rl
    entry.main(settings, stop)


if __name__ == "__main__":
    leave(run_entry("rl", main))
