"""From response text to the program that is to be tested."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_klear.records import FinishReason
from megatron_klear.reward.code_tests import BadTestsError, parse_problem
from megatron_klear.reward.rules import AnswerFormat, Verdict
from megatron_klear.reward.think import split_thinking

MAX_CODE_CHARS = 65_536
"""A longer program is wrong without being run."""

_FENCE = re.compile(r"[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)")
_PYTHON = frozenset({"", "py", "python", "python3", "py3"})


class CodeQuestion(NamedTuple):
    """A program and its tests; equal questions have equal verdicts.

    Attributes:
        program: code of the last fenced block.
        reference: tests as JSON; read already, and known to be usable.
    """

    program: str
    reference: str


def read_program(
    response: str, reference: str, finish_reason: FinishReason, fmt: AnswerFormat
) -> Verdict | CodeQuestion:
    """The verdict where the form of the response already decides, otherwise the question for a sandbox."""
    for name, text in (("response", response), ("reference", reference)):
        if not isinstance(text, str):
            return Verdict("ungraded", f"the {name} is {type(text).__name__}, not text")
    if finish_reason == "abort":
        return Verdict("ungraded", "the generation was interrupted")
    # First, so that an unusable problem is ungraded for every response, and not only for those with a program.
    try:
        parse_problem(reference)
    except BadTestsError as error:
        return Verdict("ungraded", str(error))
    split = split_thinking(response, fmt, finish_reason=finish_reason)
    if split.is_malformed:
        return Verdict("malformed", split.problem)
    program, problem = last_code_block(split.answer)
    if program is None:
        cut = ": the token limit was reached" if finish_reason == "length" else ""
        return Verdict("wrong", problem + cut, 0.0)
    if len(program) > MAX_CODE_CHARS:
        return Verdict("wrong", f"the program has {len(program)} characters, more than {MAX_CODE_CHARS}", 0.0)
    return CodeQuestion(program, reference)


def last_code_block(text: str) -> tuple[str | None, str]:
    """Content of the last fenced block, and what is wrong with it.

    A block that is not closed is the last word of the response and is not replaced by an earlier one.

    Returns:
        (code, ""), or (None, problem).
    """
    fence, language, start = "", "", 0
    found: tuple[str, str] | None = None
    position = 0
    for line in text.splitlines(keepends=True):
        match = _FENCE.fullmatch(line.rstrip())
        if match and not fence:
            fence, language, start = match.group(1), match.group(2).strip().lower(), position + len(line)
        elif match and fence and match.group(1).startswith(fence) and not match.group(2).strip():
            found, fence = (language, text[start:position]), ""
        position += len(line)
    if fence:
        return None, "the last code block is not closed"
    if found is None:
        return None, "no fenced code block after the thinking part"
    language, code = found
    first_word = language.split()[0] if language else ""
    if first_word not in _PYTHON:
        return None, f"the last code block is {first_word[:20]!r}, not Python"
    if not code.strip():
        return None, "the last code block is empty"
    return code, ""
