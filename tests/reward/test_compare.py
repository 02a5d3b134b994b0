"""Known verdicts of the comparison, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.reward.answers import Question
from megatron_klear.reward.compare import MathVerify
from megatron_klear.reward.rules import Verdict

EQUAL = r"""
42 | 42 || 42 | 42.0 || 42 | \frac{84}{2} || 007 | 7 || -0 | 0 || +3 | 3
1,000 | 1000 || 1{,}000 | 1000 || 1\,000 | 1000 || 2 000 000 | 2000000 || 1,\!234 | 1234
1/3 | \frac13 || 1/3 | \dfrac{1}{3} || 0.333333 | 1/3 || -\frac{1}{2} | \frac{-1}{2} || 2\frac12 | 2.5 || 1 1/2 | 3/2
10^5 | 100000 || 1.5\times 10^3 | 1500 || 2.5e3 | 2500 || 0.0000001 | 1e-7 || 5! | 120 || \binom{5}{2} | 10
\sqrt{16} | 4 || \frac{\sqrt2}{2} | \frac{1}{\sqrt{2}} || \log_2 8 | 3 || 3\pi | 3*pi || √2 | \sqrt{2}
\sqrt{50} | 5\sqrt2
50\% | 50 || 50\% | 0.5 || 0.5 | 50\% || \frac{3}{4} | 75\%
5 | 5\text{ cm} || 5\ \mathrm{cm} | 5 || 5 | \$5 || \$5.00 | 5 || 30^\circ | 30 || 30 degrees | 30^{\circ}
1,2 | 2,1 || \{1,2\} | \{2,1\} || \{1,2\} | 2, 1 || \pm 2 | 2,-2 || 11\text{ or }13 | 13, 11 || \emptyset | \varnothing
(2,1) | (2,1) || (2,1) | \left(2, 1\right) || (1,2,3) | (1,2,3) || (\frac12, 3) | (0.5, 3)
[0,1) | [0, 1) || (-\infty,2] | x \le 2 || x \le 2 | (-\infty,2] || x \le 2 | 2 \ge x || (1,2) | 1 < x < 2
(-\infty,-1)\cup(1,\infty) | (1,\infty)\cup(-\infty,-1) || \mathbb{R} | (-\infty,\infty)
x^2+2x+1 | (x+1)^2 || 2+3i | 3i+2 || x=5 | 5 || 5 | x = 5 || y=2x+1 | y = 1+2x || x^2+y^2=1 | y^2+x^2=1
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
A | A || A | (A) || C | \text{C} || C | \textbf{(C)}\ 5 || (C) | C || E | \mathrm{E} || \textbf{(B)} | B. 12
Monday | monday || Monday | \text{Monday} || no solution | \text{No solution.} || yes | \text{Yes}
$5$ | 5 || \boxed{12} | 12 || the result is \boxed{12}. | 12 || \(\frac{1}{2}\) | 0.5 || 5. | 5 || ½ | 0.5
12 dollars | 12 || 12 | 12 dollars || 3 square meters | 3 || 100 (i.e., all values) | 100 || (2,3) | 2<x<3
x \le 2 | (-\infty,2] || 3:4 | \frac{3}{4} || 1 and 2 | 1, 2 || 60\% | 0.6
"""

DIFFERENT = r"""
42 | 43 || 42 | -42 || 42 | 41.9999 || 42 | 4.2 || 1,000 | 1 || 1 000 | 0 || 1 1/2 | 1 || 100 | 1{,}00
1/3 | 0.333 || 1/3 | 3 || \pi | 3.14 || \frac{22}{7} | \pi || 0.0000001 | 0.0000002 || 0.00012345 | 0.00012445
12345678901234567890 | 12345678901234567891 || 10^{-8} | 2\times 10^{-8} || 10^5 | 10^6
50\% | 5000\% || 50\% | 0.05 || 5\text{ cm} | 6\text{ cm} || 90^\circ | \frac{\pi}{2}
1,2 | 1,2,3 || 1,2 | 1 || 1 | 1,2 || \{1,2\} | \{1,3\} || \pm 2 | 2 || \emptyset | 0
(2,1) | (1,2) || (1,2,3) | (3,2,1) || (2,1) | (5,3) || (2,1) | \emptyset
[0,1) | [0,1] || (1,2) | [1,2] || x \le 2 | x < 2 || x \le 2 | x \ge 2 || (-\infty,2] | (-\infty,2)
x^2+2x+1 | (x-1)^2 || 2+3i | 2-3i || x=5 | y=5 || y=2x+1 | y=2x || 2n | 2k || \sqrt{2} | -\sqrt{2}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&5\end{pmatrix}
A | B || C | A, B, C, D || C | (A) (B) (C) || C | C) or D) || C | 3
Monday | Sunday || even | neve || blue | red || no solution | solution || yes | no || Monday | 1
5 | ??? || 5 | \frac{1}{ || 5 | the answer is 5 and not 6 || 5 | nothing || 5 | \x00 || 7 | 12 apples and 7 pears
12 dollars | 13 || 12 | 13 dollars || 100 (i.e., all values) | 99 || (2,3) | 2 \le x<3
"""

UNREADABLE = [r"???", r"\frac{1}{", r"\frac{0}{0}", "1/0", r"\boxed{}", r"\boxed{5", "0.(3)", "\x00", "\ud800", "🙂"]


@pytest.fixture(scope="module")
def grader() -> MathVerify:
    return MathVerify()


def rows(table: str) -> list[tuple[str, str]]:
    cells = [cell for line in table.strip().splitlines() for cell in line.split("||")]
    pairs = [cell.split(" | ") for cell in cells]
    return [(reference.strip(), answer.strip()) for reference, answer in pairs]


@pytest.mark.parametrize(("reference", "answer"), rows(EQUAL))
def test_known_correct(grader: MathVerify, reference: str, answer: str) -> None:
    verdict = grader.judge(Question(answer, reference))
    assert verdict.outcome == "correct", verdict.reason


@pytest.mark.parametrize(("reference", "answer"), rows(DIFFERENT))
def test_known_wrong(grader: MathVerify, reference: str, answer: str) -> None:
    verdict = grader.judge(Question(answer, reference))
    assert verdict.outcome == "wrong", verdict.reason
    assert verdict.reason


@pytest.mark.parametrize("reference", UNREADABLE)
@pytest.mark.parametrize("answer", ["5", "???", None])
def test_an_unreadable_reference_is_ungraded_whatever_the_answer(
    grader: MathVerify, reference: str, answer: str | None
) -> None:
    for text in (answer, reference):
        verdict = grader.judge(Question(text, reference, no_answer_reason="no box"))
        assert verdict.outcome == "ungraded"
        assert "reference cannot be read" in verdict.reason


@pytest.mark.parametrize("reference", ["5", "C", "Monday"])
def test_no_answer_is_wrong_with_its_own_reason(grader: MathVerify, reference: str) -> None:
    assert grader.judge(Question(None, reference, no_answer_reason="no box")) == Verdict("wrong", "no box")


def test_without_a_box_the_last_expression_of_the_text_counts(grader: MathVerify) -> None:
    assert grader.judge(Question("I tried 3. The answer is 5.", "5", is_boxed=False)).outcome == "correct"
    assert grader.judge(Question("I tried 5. The answer is 3.", "5", is_boxed=False)).outcome == "wrong"


DECISIONS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("math_grades.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize(("family", "expected", "reference", "answer"), DECISIONS)
def test_each_row_of_the_table_is_graded_as_decided(
    grader: MathVerify, family: str, expected: str, reference: str, answer: str
) -> None:
    verdict = grader.judge(Question(answer, reference))
    assert verdict.outcome == {"=": "correct", "!": "wrong", "~": "wrong"}[expected], (family, verdict.reason)


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_whatever_the_library_raises_is_ungraded(
    grader: MathVerify, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def explode(*_: object, **__: object) -> bool:
        raise error("inside")

    monkeypatch.setattr(grader.mathematics, "_verify", explode)
    verdict = grader.judge(Question("5", "5"))
    assert verdict.outcome == "ungraded"
    assert error.__name__ in verdict.reason


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_an_answer_that_is_too_much_for_the_grader_is_wrong(
    grader: MathVerify, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def explode(*_: object, **__: object) -> bool:
        raise error("inside")

    monkeypatch.setattr(grader.mathematics, "_verify", explode)
    assert grader.judge(Question("5", "5")) == Verdict(
        "wrong", f"the answer takes more than the grader has: {error.__name__}"
    )


def test_a_parser_out_of_resources_is_to_blame_on_who_wrote_it(grader: MathVerify) -> None:
    # math-verify swallows the RecursionError and reports a text without meaning.
    deep = r"\sqrt{" * 300 + "5" + "}" * 300
    verdict = grader.judge(Question(deep, "5"))
    assert (verdict.outcome, "RecursionError" in verdict.reason) == ("wrong", True)
    verdict = grader.judge(Question("5", deep))
    assert (verdict.outcome, "RecursionError" in verdict.reason) == ("ungraded", True)


def test_signs_outside_ascii(grader: MathVerify) -> None:
    for reference, answer in [
        ("-5", "\N{MINUS SIGN}5"),
        ("(0,1)\\cup(2,3)", "(0,1)\N{UNION}(2,3)"),
        ("12", "\uff11\uff12"),
    ]:
        assert grader.judge(Question(answer, reference)).outcome == "correct"
