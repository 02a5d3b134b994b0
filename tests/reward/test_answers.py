"""Finding the answer in the text, and the rewriting before it is parsed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_klear.reward.answers import Question, last_box, read_answer
from megatron_klear.reward.rules import AnswerFormat, Verdict
from megatron_klear.reward.spelling import normalize_expression
from megatron_klear.reward.textual import choice_letter, words

FMT = AnswerFormat()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{3}, no: \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \right.}", r"\left\{x \right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        ("\\boxed{\n7\n}", "7"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"$\boxed{5}$, put into \boxed{}.", "5"),
        (r"\boxed{a \\ b}", r"a \\ b"),
    ],
)
def test_the_last_box_with_balanced_braces_is_the_answer(text: str, content: str) -> None:
    assert last_box(text) == (content, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no box", ""),
        ("boxed{5}", ""),
        (r"\boxed 5", ""),
        (r"\boxed{}", "empty"),
        (r"\boxed{ } \boxed{}", "empty"),
        (r"\boxed{4} then \boxed{5", "not closed"),
        (r"\boxed{\frac{1}{2}", "not closed"),
        (r"\boxed{5\}", "not closed"),
    ],
)
def test_texts_without_a_usable_box_say_why(text: str, problem: str) -> None:
    content, found = last_box(text)
    assert content is None
    assert problem in found
    assert bool(found) == bool(problem)


@pytest.mark.parametrize("unit", [r"\boxed{", r"\boxed{}", r"{", r"\boxed{{}"])
def test_megabytes_of_boxes_are_read_in_linear_time(unit: str) -> None:
    text = unit * (3_000_000 // len(unit))
    start = time.perf_counter()
    assert last_box(text)[0] is None
    assert time.perf_counter() - start < 10.0


@pytest.mark.parametrize(
    ("response", "reference", "finish", "outcome", "why"),
    [
        ("no tags", "5", "stop", "malformed", "<think> is missing"),
        (r"<think>\boxed{5}", "5", "length", "malformed", "token limit"),
        (r"\boxed{5}", "5", "stop", "malformed", "<think> is missing"),
        (r"<think>a</think>\boxed{5}", "5", "abort", "ungraded", "interrupted"),
        (r"<think>a</think>\boxed{5}", "  ", "stop", "ungraded", "empty"),
        (r"<think>a</think>\boxed{5}", "5" * 4097, "stop", "ungraded", "4097"),
        (r"<think>a</think>\boxed{5}", 5, "stop", "ungraded", "reference is int"),
        (None, "5", "stop", "ungraded", "response is NoneType"),
    ],
)
def test_form_alone_decides_where_it_can(response: Any, reference: Any, finish: Any, outcome: str, why: str) -> None:
    verdict = read_answer(response, reference, finish, FMT)
    assert isinstance(verdict, Verdict)
    assert verdict.outcome == outcome
    assert why in verdict.reason


@pytest.mark.parametrize(
    ("response", "finish", "why"),
    [
        ("<think>a</think>the answer is 5", "stop", "no \\boxed"),
        ("<think>a</think>the answer is 5", "length", "token limit"),
        (r"<think>\boxed{5}</think>see above", "stop", "no \\boxed"),
        (r"<think>a</think>\boxed{" + "1" * 4097 + "}", "stop", "4097 characters"),
        (r"<think>a</think>\boxed{5", "length", "not closed"),
    ],
)
def test_without_an_answer_only_the_reference_is_checked(response: str, finish: Any, why: str) -> None:
    question = read_answer(response, "5", finish, FMT)
    assert isinstance(question, Question)
    assert question.answer is None
    assert why in question.no_answer_reason


def test_a_box_may_be_optional_and_the_text_is_cut_to_its_end() -> None:
    fmt = AnswerFormat(require_box=False, max_answer_chars=8)
    question = read_answer("<think>a</think> the answer is 12345", "5", "stop", fmt)
    assert question == Question("is 12345", "5", is_boxed=False)
    assert read_answer(r"<think>a</think>no, \boxed{7}", "5", "stop", fmt) == Question("7", "5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5.", "5"),
        (r"5\,", "5"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        ("$$5$$.", "5"),
        (r"$1$ and $2$", r"$1$ and $2$"),
        (r"1\,000", "1000"),
        ("1 000 000", "1000000"),
        ("12 34", "12,34"),
        ("0.1 000", "0.1,000"),
        ("1 1/2", r"1\frac{1}{2}"),
        ("1.5e-3", r"1.5\times 10^{-3}"),
        ("2e", "2e"),
        ("3pi", r"3\pi"),
        (r"\pi", r"\pi"),
        (r"\text{(1, 2)}", "(1, 2)"),
        (r"\text{Monday}", r"\text{Monday}"),
        ("√12", r"\sqrt{12}"),
        ("", ""),
    ],
)
def test_rewriting_of_what_math_verify_misreads(text: str, expected: str) -> None:
    assert normalize_expression(text) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C)", "C"),
        (r"\text{C}", "C"),
        (r"\textbf{(C)}", "C"),
        (r"\textbf{(C)}\ 5", "C"),
        ("C. 5", "C"),
        ("C) 5", "C"),
        ("**C**", "C"),
        ("(C) the (D)", None),
        ("A, B, C", None),
        ("(A)(B)", None),
        ("c", None),
        ("K", None),
        ("C = 5", None),
        ("5", None),
    ],
)
def test_choice_letters(text: str, letter: str | None) -> None:
    assert choice_letter(text, with_text=True) == letter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Monday", "monday"),
        (r"\text{No solution}.", "no solution"),
        ("New  York", "new york"),
        ("xyz", None),
        ("5 cm", None),
        (r"\infty", None),
        ("", None),
    ],
)
def test_words(text: str, expected: str | None) -> None:
    assert words(text) == expected
