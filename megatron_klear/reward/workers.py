"""Math grading in killable worker processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_klear.errors import ConfigError, RewardError
from megatron_klear.records import FinishReason, Grade
from megatron_klear.reward.answers import Question, read_answer
from megatron_klear.reward.pool import WorkerPool
from megatron_klear.reward.rules import AnswerFormat, RewardRules, Verdict
from megatron_klear.reward.worker_handle import Worker

MINIMUM_MEMORY_BYTES = 256 * 2**20
_PLAIN_ANSWER = "0.8271"
"""Cheap to read and to compare: what is too much beside it is the reference."""


class GradeRequest(NamedTuple):
    """One response to grade; `request_id` must be unique within a call."""

    request_id: str
    response: str
    reference: str
    finish_reason: FinishReason = "stop"


class MathGraderPool(WorkerPool[Question]):
    """Grades math answers in parallel worker processes; use it as a context manager, from any thread.

    Grades depend only on the text of an answer and its reference, never on order, neighbours or the number of
    workers. Equal questions within a call are decided once. Workers start in the background with the pool.

    Args:
        workers: processes, and answers graded at the same time.
        timeout_seconds: CPU time of one answer; its worker is ended, and the answer is `wrong` if the reference
            compares with a plain number within the limit, else `ungraded`. Ten times as long on the wall clock, for a
            worker that gets no CPU time: then the answer is `ungraded`.
        memory_limit_bytes: address space of a worker (RLIMIT_AS), None for no limit. An answer that needs more is
            `wrong`. An allocation that fails inside sympy's simplification may be swallowed there: "not equal".
        rules, answer_format: rewards, and the form a response must have.

    Raises:
        ConfigError: a number is out of bounds.
    """

    def __init__(
        self,
        *,
        workers: int = 4,
        timeout_seconds: float = 5.0,
        memory_limit_bytes: int | None = 4 * 2**30,
        rules: RewardRules | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> None:
        problems = []
        if workers < 1:
            problems.append(f"reward.workers: must be at least 1, got {workers}")
        if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
            problems.append(f"reward.timeout_seconds: must be a positive number of seconds, got {timeout_seconds}")
        if memory_limit_bytes is not None and memory_limit_bytes < MINIMUM_MEMORY_BYTES:
            at_least = f"{MINIMUM_MEMORY_BYTES} (256 MiB)"
            problems.append(f"memory of a math grader: must be at least {at_least}, got {memory_limit_bytes}")
        if problems:
            raise ConfigError(problems)
        self.rules = rules or RewardRules()
        self.answer_format = answer_format or AnswerFormat()
        super().__init__(
            lambda: Worker(memory_limit_bytes or 0, timeout_seconds),
            workers,
            "math grading",
            without_answer=lambda question: question._replace(answer=_PLAIN_ANSWER, is_boxed=True),
        )

    def grade_many(
        self,
        requests: Sequence[GradeRequest | tuple[str, str, str]],
        *,
        rules: RewardRules | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> list[Grade]:
        """Grades in the order of the requests.

        Args:
            requests: `GradeRequest`s, or plain (id, response, reference) of finished responses.
            rules, answer_format: for this call only; default the pool's.

        Raises:
            RewardError: two requests share an id, the pool is closed, or no worker could be started, so that
                every answer that needed one would be ungraded.
        """
        rules, answer_format = rules or self.rules, answer_format or self.answer_format
        entries: dict[str, Verdict | Question] = {}
        for request in requests:
            request_id, response, reference, finish_reason = GradeRequest(*request)
            if request_id in entries:
                raise RewardError(f"two answers to grade share the id {request_id!r}")
            entries[request_id] = read_answer(response, reference, finish_reason, answer_format)
        verdicts = self.decide([entry for entry in entries.values() if isinstance(entry, Question)])
        found = [verdicts[entry] if isinstance(entry, Question) else entry for entry in entries.values()]
        return [rules.grade(verdict.outcome, verdict.reason) for verdict in found]
