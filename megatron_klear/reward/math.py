"""Grading one math answer at a time."""

from __future__ import annotations

import os
import threading

from megatron_klear.errors import RewardError
from megatron_klear.records import FinishReason, Grade
from megatron_klear.reward.rules import AnswerFormat, RewardRules
from megatron_klear.reward.workers import GradeRequest, MathGraderPool

_lock = threading.Lock()
_shared: tuple[int, MathGraderPool] | None = None
"""The process that made the pool, and the pool: after a fork its threads exist in the parent only."""


def grade_math(
    response: str,
    reference: str,
    *,
    finish_reason: FinishReason = "stop",
    rules: RewardRules | None = None,
    answer_format: AnswerFormat | None = None,
) -> Grade:
    r"""Grade one response: the last `\boxed{...}` after the thinking part against the reference, by math-verify.

    Runs in one killable worker process that is started at the first call (about a second) and shared by all later
    ones, with a limit of 5 seconds; safe from any thread and on any text. Use `MathGraderPool` for many responses.

    Args:
        response: decoded response text; of the prompt only an opening marker that it ends with.
        reference: gold answer: a number, LaTeX, a choice letter or words, with or without a box or dollar signs.
        finish_reason: why the generation ended; `abort` is ungraded, `length` is graded as far as it got.
        rules: rewards; default `RewardRules()`.
        answer_format: markers and strictness; default `AnswerFormat()`.

    Returns:
        A grade; `ungraded` with the reason whenever the grader fails. Nothing about the texts raises.
    """
    request = GradeRequest("response", response, reference, finish_reason)
    try:
        return _shared_pool().grade_many([request], rules=rules, answer_format=answer_format)[0]
    except RewardError as error:
        return (rules or RewardRules()).grade("ungraded", str(error))


def _shared_pool() -> MathGraderPool:
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), MathGraderPool(workers=1))
        return _shared[1]


def _forget_lock() -> None:
    """A forked child may inherit the lock as held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
