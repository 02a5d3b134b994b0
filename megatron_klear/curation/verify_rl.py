"""Which problems can be reinforced on: enough tests, and a reference that a teacher confirms (section 3.2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.grading import count_tests
from megatron_klear.curation.responding import RespondStage
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Stage, UnitLog


class TestsStage(Stage):
    """Leaves out code problems with few tests; math problems pass.

    Args:
        settings: of the run.
    """

    name = "tests"

    def __init__(self, settings: CurationSettings) -> None:
        self._minimum = settings.tests.minimum

    def depends_on(self) -> dict[str, Any]:
        """The number of tests."""
        return {"minimum": self._minimum}

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield math rows, and code rows with enough tests."""
        for row in rows:
            if row.domain == "math":
                yield row
                continue
            number = count_tests(row.reference)
            if isinstance(number, str):
                log.reject(row, number, "tests that cannot be read")
                continue
            log.audit.count("code problems by number of tests", _bucket(number))
            if number >= self._minimum:
                yield row
            else:
                log.drop(row, "too few tests", tests=number)


def _bucket(number: int) -> str:
    bounds = (0, 1, 4, 8, 16, 32, 64, 128)
    low = max(bound for bound in bounds if bound <= number)
    place = bounds.index(low)
    if place + 1 == len(bounds):
        return f"{low} and more"
    high = bounds[place + 1] - 1
    return str(low) if high == low else f"{low} to {high}"


def pass_at_k(correct: int, responses: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k responses is correct: 1 - C(n - c, k) / C(n, k).

    Args:
        correct: c.
        responses: n, at least 1; with fewer than k responses, k is n, which is no estimate of pass@k but below it.
        k: at least 1.
    """
    k = min(k, responses)
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k)


class SolvableStage(RespondStage):
    """Draws a teacher's responses and keeps problems that it solves often enough.

    For code, pass@k must be above `solvable.code_above`. With as many responses as k that is: one of them passes all
    tests at least. A row that brings fewer responses of its own than k is dropped by that name: pass@k cannot be
    estimated from them, and the teacher's would mix two models. For math, the share of correct responses must be above
    `solvable.math_above`, the majority. A response that could not be graded counts neither way: `graded_at_least` says
    how many must have been, and pass@k is that of all graded ones where they are fewer than k.

    Args:
        settings: of the run.
    """

    name = "solvable"

    def __init__(self, settings: CurationSettings) -> None:
        super().__init__(settings)
        self._rule = settings.solvable

    def depends_on(self) -> dict[str, Any]:
        """How responses are drawn and graded, and the rule; its number goes up when it judges otherwise."""
        return {**super().depends_on(), "rule": asdict(self._rule), "judges": 2}

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows that the teacher solves."""
        for row in super().apply(self._enough(rows, log), log):
            outcomes = [response.outcome for response in row.responses]
            graded = sum(outcome != "ungraded" for outcome in outcomes)
            correct = outcomes.count("correct")
            if graded == 0 or graded < self._rule.graded_at_least * len(outcomes):
                reasons = [r.reason for r in row.responses if r.outcome == "ungraded"]
                log.drop(row, "too few responses could be graded", graded=graded, reason_of_one=reasons[0])
                continue
            row.pass_rate = correct / graded
            log.audit.count("problems by pass rate", rate_bucket(row.pass_rate))
            if row.domain == "math":
                value, bound, rule = row.pass_rate, self._rule.math_above, "share of correct responses"
            elif self._rule.code_rule == "pass_rate":
                value, bound, rule = row.pass_rate, self._rule.code_above, "share of correct responses"
            else:
                value, bound = pass_at_k(correct, graded, self._rule.k), self._rule.code_above
                rule = f"pass@{self._rule.k}"
            if value > bound:
                yield row
            else:
                log.drop(row, f"{row.domain}: {rule} not above {bound:g}", value=round(value, 4), correct=correct)

    def _enough(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Rows that bring no responses, or as many as their rule needs; the others are not worth grading."""
        for row in rows:
            brought = len(row.responses)
            if row.domain == "code" and self._rule.code_rule == "pass_at_k" and 0 < brought < self._rule.k:
                log.drop(row, f"code: brings fewer responses than pass@{self._rule.k} needs", responses=brought)
            else:
                yield row


def rate_bucket(rate: float) -> str:
    """A pass rate in tenths, as `0.3 to 0.4`; 0 and 1 stand for themselves."""
    if rate in (0.0, 1.0):
        return f"{rate:.0f}"
    low = min(int(rate * 10), 9)
    return f"{low / 10:.1f} to {(low + 1) / 10:.1f}"
