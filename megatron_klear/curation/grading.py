"""Grading for curation: responses of rows, and whether a reference can be graded against at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.row import Response, Row
from megatron_klear.records import Domain, FinishReason
from megatron_klear.reward import BadTestsError, GradeRequest, parse_problem
from megatron_klear.session.grading import Graders, GraderSettings

_STRANGE_ANSWER = "-918273645546372819"


class RowGraders:
    """Judges responses of all domains; processes are started when the first response of a domain comes.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: CurationSettings) -> None:
        self._graders = Graders(GraderSettings(reward=settings.reward, code_reward=settings.code_reward))

    def grade_responses(self, rows: Sequence[Row]) -> None:
        """Write into every response what the grader says of it; without a reference it is ungraded.

        Raises:
            RewardError: no grader of a domain can be started.
        """
        asked: list[Response] = []
        domains: list[Domain] = []
        requests: list[GradeRequest] = []
        for number, row in enumerate(rows):
            for index, response in enumerate(row.responses):
                if row.reference is None:
                    response.outcome, response.reason = "ungraded", "the row has no reference"
                    continue
                finish: FinishReason = "length" if response.finish_reason == "length" else "stop"
                asked.append(response)
                domains.append(row.domain)
                requests.append(GradeRequest(f"{number}#{index}", response.text, row.reference, finish))
        for response, grade in zip(
            asked, self._graders.grade_many(list(zip(domains, requests, strict=True))), strict=True
        ):
            response.outcome, response.reason = grade.outcome, grade.reason

    def reference_faults(self, rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
        """Rows whose reference cannot be graded against, and why.

        As an answer, a math reference must be found correct, and a strange answer must be told from it. The tests of a
        code problem must be well formed; they are not run.
        """
        asked = [row for row in rows if row.domain == "math" and row.reference is not None]
        own = [_boxed(f"own {i}", row.reference, row.reference) for i, row in enumerate(asked)]
        strange = [_boxed(f"strange {i}", _STRANGE_ANSWER, row.reference) for i, row in enumerate(asked)]
        requests = [*own, *strange]
        grades = self._graders.grade_many([("math", request) for request in requests])
        for row, right, wrong in zip(asked, grades[: len(asked)], grades[len(asked) :], strict=True):
            if right.outcome != "correct":
                yield row, f"the grader finds the reference {right.outcome} as its own answer: {right.reason}"
            elif wrong.outcome == "ungraded":
                yield row, f"the grader cannot tell a wrong answer from the reference: {wrong.reason}"
        for row in rows:
            number = count_tests(row.reference) if row.domain == "code" and row.reference is not None else 1
            if isinstance(number, str):
                yield row, number

    def close(self) -> None:
        """End the grader processes; a second call does nothing."""
        self._graders.close()


def count_tests(reference: str | None) -> int | str:
    """Number of tests of a code problem, or why they cannot be used; their form is that of `reward.code_tests`."""
    if reference is None:
        return "the row has no reference, which must hold the tests"
    try:
        return len(parse_problem(reference).messages())
    except BadTestsError as error:
        return f"the tests cannot be used: {error}"


def _boxed(name: str, answer: str | None, reference: str | None) -> GradeRequest:
    return GradeRequest(name, f"<think></think>\\boxed{{{answer}}}", reference or "")
