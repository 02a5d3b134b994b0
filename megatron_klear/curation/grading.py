"""Grading for curation: one place that knows which grader judges which domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_klear.config import RewardSettings
from megatron_klear.curation.row import Response, Row
from megatron_klear.records import Domain, Grade
from megatron_klear.reward import AnswerFormat, GradeRequest, MathGraderPool, RewardRules

_STRANGE_ANSWER = "-918273645546372819"


def _boxed(name: str, answer: str | None, reference: str | None) -> GradeRequest:
    return GradeRequest(name, f"<think></think>\\boxed{{{answer}}}", reference or "")


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
        """Rows whose reference the grader cannot use: as an answer it must be correct, and a strange answer wrong."""
        asked = [row for row in rows if row.domain == "math" and row.reference is not None]
        own = [_boxed(f"own {i}", row.reference, row.reference) for i, row in enumerate(asked)]
        strange = [_boxed(f"strange {i}", _STRANGE_ANSWER, row.reference) for i, row in enumerate(asked)]
        grades = self.grade("math", [*own, *strange])
        for row, right, wrong in zip(asked, grades[: len(asked)], grades[len(asked) :], strict=True):
            if right.outcome != "correct":
                yield row, f"the grader finds the reference {right.outcome} as its own answer: {right.reason}"
            elif wrong.outcome == "ungraded":
                yield row, f"the grader cannot tell a wrong answer from the reference: {wrong.reason}"

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
