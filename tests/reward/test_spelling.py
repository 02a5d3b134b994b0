"""Letters, numerals and units of an answer, before it is parsed."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from megatron_klear.reward import formulas, geometry, remarks, shape
from megatron_klear.reward.answers import Question
from megatron_klear.reward.compare import MathVerify
from megatron_klear.reward.latex import without_long_spaces
from megatron_klear.reward.letters import tell_apart
from megatron_klear.reward.numerals import write_out_numerals
from megatron_klear.reward.spelling import normalize_expression
from megatron_klear.reward.textual import same_choices, same_statements, word_list
from megatron_klear.reward.units import in_one_unit, measured


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("N", "n", ("N", "n")),  # each text has one size only: the same letter
        ("R^2-r^2", "0", ("w^2-r^2", "0")),
        ("w^2-W^2", "1", ("w^2-z^2", "1")),  # a letter in use is not taken
        ("f'(x)", "f(x)", ("w(x)", "f(x)")),
        (r"f^{\prime}(x)", "f'(x)", ("w(x)", "w(x)")),
        ("y''+y'", "y'", ("w+z", "z")),
        ("(fg)'", "fg", ("(fg)^{w}", "fg")),
        (r"\Delta-\delta", r"\delta", (r"w-\delta", r"\delta")),
        (r"\overrightarrow{AB}", r"\overrightarrow{BA}", ("w", "z")),
        (r"\angle ABC", r"\angle CBA", (r"\angle w", r"\angle w")),
        (r"\mathbb{R}", "r", (r"\mathbb{R}", "r")),
        (r"\begin{pmatrix}P\end{pmatrix}", "5", (r"\begin{pmatrix}P\end{pmatrix}", "5")),
        (r"5\text{ N}", r"5\text{ n}", (r"5\text{ N}", r"5\text{ n}")),
        (r"30^\circ 15'", "1", (r"30^\circ 15'", "1")),  # minutes of an angle
        ("", "", ("", "")),
    ],
)
def test_names_that_the_parser_merges_get_letters_of_their_own(
    first: str, second: str, expected: tuple[str, str]
) -> None:
    assert tell_apart(first, second) == expected


def test_more_names_than_free_letters_leave_the_texts_as_they_are() -> None:
    text = "+".join(f"{letter}'+{letter}''" for letter in "abcdefghijklmnopqrstuvwxyz")
    assert tell_apart(text, "1") == (text, "1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0x1F", "31"),
        ("0b101+0o17", "5+15"),
        ("10x+1", "10x+1"),
        ("0.5x", "0.5x"),
        ("7!!", "105"),  # 7 * 5 * 3 * 1
        ("6!!", "48"),
        ("(3!)!", "(3!)!"),
        ("1.5 million", "1500000"),
        (r"1.234567\text{ thousand}", "1234.567"),
        ("2 hundred thousand", "200000"),
        (r"1,500\text{ million dollars}", r"1500000000\text{ dollars}"),
        (r"\frac{3}{4}\text{ billion}", r"(\frac{3}{4}) \cdot 10^{9}"),
        ("millionaire", "millionaire"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (r"12\,345", "12345"),
    ],
)
def test_numerals_are_written_out(text: str, expected: str) -> None:
    assert write_out_numerals(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 hours 20 minutes", r"200\text{ minutes}"),
        (r"3\text{ hours and }20\text{ minutes}", r"200\text{ minutes}"),
        ("2 h 5 m", r"125\text{ min}"),
        (r"1\text{ day, }1.5\text{ hours}", r"\frac{51}{2}\text{ hours}"),
        ("5'7\"", r"67\text{ in}"),
        (r"30^\circ 15' 36''", r"\frac{1513}{50}^\circ"),  # 30 + 15/60 + 36/3600
        ("3 hours", "3 hours"),
        ("20 minutes 3 hours", "20 minutes 3 hours"),
        ("3 hours 20 cm", "3 hours 20 cm"),
        ("3 apples 20 pears", "3 apples 20 pears"),
    ],
)
def test_quantities_in_several_units_are_written_in_one(text: str, expected: str) -> None:
    assert in_one_unit(text) == expected


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        (r"5\text{ acres}", "length to the power 2", Fraction(4046_8564224, 10**7)),  # 43,560 square feet
        (r"5\text{ gallons}", "volume", Fraction(231 * 254**3, 10**9)),  # 231 cubic inches in litres
        (r"5\text{ kWh}", "energy", Fraction(3_600_000)),
        (r"20^\circ\text{C}", "temperature in Celsius", Fraction(1)),
        (r"20\text{ degrees Fahrenheit}", "temperature in Fahrenheit", Fraction(1)),
        (r"5\text{ km/h}", "speed", Fraction(5, 18)),
        (r"5\ \mathrm{m}^2", "length to the power 2", Fraction(1)),
    ],
)
def test_units_are_exact(text: str, kind: str, size: Fraction) -> None:
    found = measured(text)
    assert found is not None
    assert (found.unit.kind, found.unit.size) == (kind, size)
    assert found.value in ("5", "20")


def test_an_acre_is_43560_square_feet() -> None:
    acre, foot = measured(r"1\text{ acre}"), measured(r"1\text{ square foot}")
    assert acre is not None
    assert foot is not None
    assert acre.unit.kind == foot.unit.kind
    assert acre.unit.size / foot.unit.size == 43_560


@pytest.mark.parametrize(
    "unit",
    [
        "3 x ",
        "3 hours ",
        "3 xand ",
        "1,",
        "N'n",
        r"\text{ million}",
        "5 million ",
        "0x",
        "'",
        "1:",
        "~",
        r"\ ",
        r"\ ~",
        r"\, \;",
        r"\\\\ ",
        r"30^\circ ",
        "A , ",
        r"5\,",
        r"p\land ",
        r"\neg ",
        r"(p\lor ",
        "((x=1 or ",
        "x=1 or ",
        r"A\cup B'",
        r"AB\parallel ",
        "(i.e.",
        ", or equivalently ",
        "sum_(",
        r"\pm 1, ",
    ],
)
def test_the_longest_answers_are_rewritten_at_once(unit: str) -> None:
    text = without_long_spaces((unit * 4096)[:4096])  # as the grader begins with it
    start = time.process_time()
    rewritten = normalize_expression(text)
    tell_apart(rewritten, text)
    shape.ratio(text)
    shape.directions(text)
    shape.has_ellipsis(text)
    measured(text)
    remarks.split_domain(rewritten)
    remarks.changing_words(text)
    same_choices(text, "A, B")
    word_list(text)
    shape.both_signs(text)
    shape.named_by_operator(text)
    remarks.explanations(text)
    remarks.equivalents(text)
    same_statements(text, "I, II")
    formulas.formula(text)
    formulas.relations(rewritten)
    geometry.statement(text)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("space", [" ", r"\ ", "~", r"\,", r"\; ", "\n", r"\ ~", ""])
@pytest.mark.parametrize(("value", "other"), [("5", "6"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("(1, 2)", "(2, 1)")])
def test_long_spaces_say_nothing(space: str, value: str, other: str) -> None:
    grader = MathVerify()
    spaced = space * 50 + value + space * 50
    assert grader.judge(Question(spaced, value)).outcome == "correct"
    assert grader.judge(Question(value, spaced)).outcome == "correct"
    assert grader.judge(Question(spaced, other)).outcome == "wrong"


def test_rows_of_a_matrix_keep_their_spaces() -> None:
    text = r"\\ 1 \\  2 \ 3 \\\ 4 \\ "
    assert without_long_spaces(text) == text


def test_an_answer_on_which_the_library_fails_does_not_escape_its_grade(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grader = MathVerify()
    verify = grader.mathematics._verify

    def fails_on_seven(gold: object, answer: object, **settings: object) -> bool:
        if str(answer) == "7":
            raise KeyError("inside")
        return bool(verify(gold, answer, **settings))

    monkeypatch.setattr(grader.mathematics, "_verify", fails_on_seven)
    assert grader.judge(Question("5", "5")).outcome == "correct"
    verdict = grader.judge(Question("7", "5"))
    assert (verdict.outcome, "cannot be compared: KeyError" in verdict.reason) == ("wrong", True)
    # Where the library fails on the reference itself, its own spelling is no answer to blame.
    assert grader.judge(Question("5", "7")).outcome == "wrong"
    assert grader.judge(Question("7", "7")).outcome == "ungraded"
