"""Evaluations during training as files: what a run's model answered at a step, with intervals, pass@k and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_klear import __version__
from megatron_klear.data.rows import PromptRow
from megatron_klear.evaluation.generations import Generation, write_generations
from megatron_klear.evaluation.grading import grading_rules
from megatron_klear.evaluation.results import Judged
from megatron_klear.evaluation.writing import GENERATIONS_FILE, Benchmark, write_evaluation
from megatron_klear.records import Prompt, ScoredGroup
from megatron_klear.session.session import Session

EVALUATIONS = "evaluations"
_NAME = "heldout"
"""What the problems of `data.heldout` are called, as a benchmark."""


def write_heldout(session: Session, groups: Sequence[ScoredGroup], step: int) -> None:
    """Write responses, grades, results and the page into `evaluations/step-N` of the run's directory.

    Args:
        session: of the run; called by its first rank.
        groups: one per problem, graded.
        step: whose weights answered.

    Raises:
        OSError: something cannot be written.
    """
    directory = session.root / EVALUATIONS / f"step-{step}"
    directory.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(name=_NAME, rows=tuple(_row(group.group.prompt) for group in groups))
    judged = [item for group in groups for item in _judged(session, group)]
    write_generations(directory / GENERATIONS_FILE, (item.generation for item in judged))
    facts = _facts(session, step) | {"grading rules": grading_rules(session.settings, [benchmark])}
    write_evaluation(directory, [benchmark], {_NAME: judged}, facts=facts, seed=session.settings.run.seed)


def _row(prompt: Prompt) -> PromptRow:
    asked = ({"role": "user", "content": prompt.text},)
    return PromptRow(
        row_id=prompt.prompt_id, domain=prompt.domain, messages=asked, reference=prompt.reference, where="data.heldout"
    )


def _judged(session: Session, group: ScoredGroup) -> list[Judged]:
    return [
        Judged(
            generation=Generation(
                problem_id=group.group.prompt.prompt_id,
                index=index,
                response=session.chat.response_text(rollout.response_ids),
                finish_reason=rollout.finish_reason,
                num_tokens=len(rollout.response_ids),
                benchmark=_NAME,
            ),
            grade=grade,
        )
        for index, (rollout, grade) in enumerate(zip(group.group.rollouts, group.grades, strict=True))
    ]


def _facts(session: Session, step: int) -> dict[str, Any]:
    settings = session.settings
    evaluation = settings.evaluation
    return {
        "model": f"step {step} of {session.root}",
        "responses per problem": evaluation.samples_per_prompt,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "max_response_tokens": evaluation.max_response_tokens or settings.rollout.max_response_tokens,
        "thinking part required": settings.reward.require_think,
        "seed": settings.run.seed,
        "megatron_klear": __version__,
    }
