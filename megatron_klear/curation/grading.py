"""Grading for curation: one place that knows which grader judges which domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_klear.config import RewardSettings
from megatron_klear.curation.row import Response, Row
from megatron_klear.records import Domain, Grade
from megatron_klear.reward import AnswerFormat, GradeRequest, MathGraderPool, RewardRules


class Graders:
    """Judges responses of all domains; processes are started when the first response comes.

    Args:
        settings: section `reward`.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._math: MathGraderPool | None = None

    def judges(self, domain: Domain) -> bool:
        """Whether there is a grader for the domain."""
        return domain == "math"

    def grade(self, domain: Domain, requests: Sequence[GradeRequest]) -> list[Grade]:
        """Grades in the order of the requests."""
        if not self.judges(domain):
            return [Grade(outcome="ungraded", reward=0.0, reason=f"there is no grader for {domain}") for _ in requests]
        if self._math is None:
            self._math = self._math_pool()
        return self._math.grade_many(requests)

    def grade_responses(self, rows: Sequence[Row]) -> None:
        """Write into every response what the grader says of it; without a reference it is ungraded."""
        for domain in {row.domain for row in rows}:
            asked: list[tuple[Response, GradeRequest]] = []
            for number, row in enumerate(rows):
                for index, response in enumerate(row.responses if row.domain == domain else ()):
                    if row.reference is None:
                        response.outcome, response.reason = "ungraded", "the row has no reference"
                        continue
                    finish = "length" if response.finish_reason == "length" else "stop"
                    request = GradeRequest(f"{number}#{index}", response.text, row.reference, finish)  # type: ignore[arg-type]
                    asked.append((response, request))
            grades = self.grade(domain, [request for _, request in asked])
            for (response, _), grade in zip(asked, grades, strict=True):
                response.outcome, response.reason = grade.outcome, grade.reason

    def reference_faults(self, rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
        """Rows whose reference the grader does not take for its own correct answer, and what it says instead."""
        asked = [row for row in rows if row.domain == "math" and row.reference is not None]
        requests = [
            GradeRequest(str(i), f"<think></think>\\boxed{{{row.reference}}}", row.reference or "")
            for i, row in enumerate(asked)
        ]
        for row, grade in zip(asked, self.grade("math", requests), strict=True):
            if grade.outcome != "correct":
                yield row, f"the grader finds the reference {grade.outcome} as its own answer: {grade.reason}"

    def close(self) -> None:
        """End the grader processes; a second call does nothing."""
        if self._math is not None:
            self._math.close()
            self._math = None

    def _math_pool(self) -> MathGraderPool:
        reward = self._settings
        return MathGraderPool(
            workers=reward.workers,
            timeout_seconds=reward.timeout_seconds,
            rules=RewardRules(correct=reward.correct, wrong=reward.wrong, malformed=reward.malformed),
            answer_format=AnswerFormat(require_think=reward.require_think),
        )
