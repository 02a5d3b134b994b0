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
