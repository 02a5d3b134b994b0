r"""From response text to the question a grading worker can decide: which answer, against which reference.

Everything here is linear in the length of the text and runs in the caller's process; only the short strings of a
`Question` travel to a worker.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_klear.records import FinishReason
from megatron_klear.reward.rules import AnswerFormat, Verdict
from megatron_klear.reward.think import split_thinking


class Question(NamedTuple):
    """What a worker decides; equal questions have equal verdicts.

    Attributes:
        answer: text of the last box (or the end of the answer text when no box is required); None when the
            response gives no answer, so that only the reference is checked.
        reference: the gold answer as the data has it.
        is_boxed: whether `answer` is the content of a box.
        no_answer_reason: why `answer` is None; the reason of the verdict if the reference is sound.
    """

    answer: str | None
    reference: str
    is_boxed: bool = True
    no_answer_reason: str = ""


def read_answer(response: str, reference: str, finish_reason: FinishReason, fmt: AnswerFormat) -> Verdict | Question:
    """The verdict where the form of the response already decides, otherwise the question for a worker."""
    for name, text in (("response", response), ("reference", reference)):
        if not isinstance(text, str):
            return Verdict("ungraded", f"the {name} is {type(text).__name__}, not text")
    if finish_reason == "abort":
        return Verdict("ungraded", "the generation was interrupted")
    split = split_thinking(response, fmt, finish_reason=finish_reason)
    if split.is_malformed:
        return Verdict("malformed", split.problem)
    if not reference.strip():
        return Verdict("ungraded", "the reference is empty")
    if len(reference) > fmt.max_answer_chars:
        return Verdict("ungraded", f"the reference has {len(reference)} characters, more than {fmt.max_answer_chars}")
    answer, problem = last_box(split.answer)
    if answer is not None and len(answer) <= fmt.max_answer_chars:
        return Question(answer, reference)
    if answer is not None:
        problem = f"the boxed answer has {len(answer)} characters, more than {fmt.max_answer_chars}"
    if problem:
        return Question(None, reference, no_answer_reason=problem)
    if not fmt.require_box:
        return Question(split.answer.strip()[-fmt.max_answer_chars :], reference, is_boxed=False)
    cut = ": the token limit was reached" if finish_reason == "length" else ""
    return Question(None, reference, no_answer_reason=rf"no \boxed{{...}} after the thinking part{cut}")


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_box(text: str) -> tuple[str | None, str]:
    r"""Content of the last non-empty `\boxed{...}` with balanced braces, and what is wrong with it.

    An empty box ("put it in \boxed{}") says nothing and is passed over; a box that is never closed is the last
    word of the response and is not replaced by an earlier one. Escaped braces do not count.

    Returns:
        (content, ""), or (None, problem), or (None, "") when there is no box at all.
    """
    problem = ""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for token in _BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)
            if depth == 0:
                content = text[start : token.start()].strip()
                if content:
                    return content, ""
                problem = "the box is empty"
                break
        else:
            return None, "the last box is not closed"
    return None, problem


_SYMBOLS = str.maketrans(
    {
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "\N{UNION}": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "±": r"\pm ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "°": r"^\circ ",
        "\N{MINUS SIGN}": "-",
        "\N{FRACTION SLASH}": "/",
        "²": "^{2}",
        "³": "^{3}",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        **{chr(ord("\N{FULLWIDTH DIGIT ZERO}") + digit): str(digit) for digit in range(10)},
    }
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_GROUPED_DIGITS = re.compile(r"(?<![\d.\\])\d{1,3}(?:(?:\\[,; ]|[ ~\u00a0\u2009\u202f])\d{3})+(?!\d)")
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\("), "sqrt("),
    (re.compile(r"(?<![A-Za-z\\{])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\{])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\(\s*i\.e\.[^()]*\)"), ""),  # a remark in an answer key: 100 (i.e., all values)
    # 2 1/2 and 1.5e-3: math-verify reads the first as 2 and the second as 1.5 * e - 3.
    (re.compile(r"(?<![\d.^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\d.A-Za-z])"), r"\1\\times 10^{\2}"),
)
# 12 dollars: math-verify drops units that are marked as text. Up to three letters may be a product, or pi.
_UNIT_IN_WORDS = re.compile(r"([-+]?[\d.,/]*\d)\s+([A-Za-z]{4,}(?: [A-Za-z]+){0,2})")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_LAST_SPACE = re.compile(r"(?:\\[,;:! ]|[\s.,;:])+$")


def normalize_expression(text: str) -> str:
    r"""Rewrite the spellings that math-verify 0.9.0 misreads; what it reads well is left alone.

    Dollar signs around the whole, trailing punctuation, digits grouped by spaces (`1\,000` is read as 1 * 0),
    mixed numbers, scientific notation, `pi` in plain text and common Unicode signs.
    """
    text = _without_wrappers(text)
    whole = _TEXT_COMMAND.fullmatch(text)
    if whole and any(char.isdigit() for char in text):
        text = whole.group(1)  # \text{(-1, 2)}; words stay marked as text
    text = _GROUPED_DIGITS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _UNIT_IN_WORDS.sub(r"\1\\text{ \2}", text) if _UNIT_IN_WORDS.fullmatch(text) else text
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.translate(_SYMBOLS).strip()


def _without_wrappers(text: str) -> str:
    while True:
        before = text
        text = _LAST_SPACE.sub("", text.strip())
        for start, end in _WRAPPERS:
            inner = text[len(start) : len(text) - len(end)]
            if text.startswith(start) and text.endswith(end) and inner and start not in inner and end not in inner:
                text = inner
                break
        if text == before:
            return text


_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOICE_AND_TEXT = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(.*)", re.DOTALL)
_SECOND_CHOICE = re.compile(r"\([A-J]\)|\b[A-J]\b")
_WORDS = re.compile(r"[A-Za-z]+(?:[ '\-]+[A-Za-z]+)*")


def _plain(text: str) -> str:
    r"""Text without `\text{}`-like commands and with single spaces."""
    text = _TEXT_COMMAND.sub(r"\1", _without_wrappers(text)).replace(r"\ ", " ").replace("~", " ").replace("**", "")
    return " ".join(text.split()).rstrip(".")


def choice_letter(text: str, *, with_text: bool = False) -> str | None:
    """The letter of a multiple-choice answer: `C`, `(C)`, and with `with_text` also `(C) 5` or `C. 5`.

    A text that names a second letter is not a choice, so that listing all of them earns nothing.
    """
    plain = _plain(text)
    match = _CHOICE.fullmatch(plain)
    if match:
        return match.group(1)
    match = _CHOICE_AND_TEXT.fullmatch(plain) if with_text else None
    if match and not _SECOND_CHOICE.search(match.group(3)):
        return match.group(1) or match.group(2)
    return None


def words(text: str) -> str | None:
    """The words of a textual answer in lower case, or None if it may be mathematics.

    math-verify reads an unmarked word as a product of letters, so anagrams would be equal. Runs of up to three
    letters stay mathematics (`abc`, `xy`).
    """
    plain = _plain(text)
    if not _WORDS.fullmatch(plain) or max(map(len, re.findall(r"[A-Za-z]+", plain))) < 4:
        return None
    return plain.casefold()
