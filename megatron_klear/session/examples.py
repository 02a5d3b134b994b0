"""Responses of a step for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_klear.records import ScoredGroup
from megatron_klear.session.session import Session


def example_rows(session: Session, groups: Sequence[ScoredGroup], step: int) -> list[dict[str, Any]]:
    """Some right and some wrong responses as rows for the report, `observe.example_rollouts` at most."""
    wanted = session.settings.observe.example_rollouts
    answers = [(g, j) for g in groups for j in range(len(g.grades))]
    right = [pair for pair in answers if pair[0].is_correct[pair[1]]]
    wrong = [pair for pair in answers if not pair[0].is_correct[pair[1]]]
    some = right[: (wanted + 1) // 2]
    chosen = some + wrong[: wanted - len(some)]
    return [_row(session, group, j, step) for group, j in chosen]


def _row(session: Session, group: ScoredGroup, j: int, step: int) -> dict[str, Any]:
    prompt, rollout, grade = group.group.prompt, group.group.rollouts[j], group.grades[j]
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        "reference": prompt.reference,
        "response": session.chat.opening + session.chat.decode(rollout.response_ids),  # end token included
        "outcome": grade.outcome,
        "reward": float(grade.reward),
        "reason": grade.reason,
        "finish_reason": rollout.finish_reason,
    }
