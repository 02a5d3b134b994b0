"""Splitting a response into its thinking part and its answer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klear.records import FinishReason
from megatron_klear.reward.rules import AnswerFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkSplit:
    """A response in two parts.

    Attributes:
        thinking: text between the markers; empty when malformed.
        answer: text after the closing marker; empty when malformed.
        problem: why the response is malformed, for people; empty when it is well formed.
    """

    thinking: str = ""
    answer: str = ""
    problem: str = ""

    @property
    def is_malformed(self) -> bool:
        """Whether the markers are not exactly one pair, in order, with an answer after them."""
        return bool(self.problem)


def split_thinking(
    response: str, answer_format: AnswerFormat | None = None, *, finish_reason: FinishReason = "stop"
) -> ThinkSplit:
    """Cut a response at its thinking markers, or say why that cannot be done.

    Well formed is: optional white space, one opening marker, thinking that may be empty, one closing marker, an answer
    that is not only white space. Nothing else is repaired: a lenient split would let a policy put answers into its
    thinking part.

    Args:
        response: decoded response text; of the prompt only an opening marker that it ends with.
        answer_format: markers and strictness; default `AnswerFormat()`.
        finish_reason: `length` only changes the words of `problem`.
    """
    fmt = answer_format or AnswerFormat()
    starts, ends = response.count(fmt.think_start), response.count(fmt.think_end)
    if not fmt.require_think and starts == ends == 0:
        return ThinkSplit(answer=response) if response.strip() else ThinkSplit(problem="the response is empty")
    problem = _count_problem(fmt, starts, ends, finish_reason)
    if problem:
        return ThinkSplit(problem=problem)
    before, thinking = response.split(fmt.think_start)
    if before.strip():
        where = "the thinking part is closed before it is opened" if fmt.think_end in before else "text comes before it"
        return ThinkSplit(problem=f"{fmt.think_start} must open the response, but {where}")
    thinking, answer = thinking.split(fmt.think_end)
    if not answer.strip():
        cut = ": the token limit was reached" if finish_reason == "length" else ""
        return ThinkSplit(problem=f"no answer after {fmt.think_end}{cut}")
    return ThinkSplit(thinking=thinking, answer=answer)


def _count_problem(fmt: AnswerFormat, starts: int, ends: int, finish_reason: FinishReason) -> str:
    """What is wrong with the numbers of markers, or an empty text."""
    if starts == 0:
        return f"{fmt.think_start} is missing"
    if starts > 1:
        return f"{fmt.think_start} occurs {starts} times, must be once"
    if ends == 0:
        cut = ": the token limit was reached while thinking" if finish_reason == "length" else ""
        return f"{fmt.think_end} is missing{cut}"
    if ends > 1:
        return f"{fmt.think_end} occurs {ends} times, must be once"
    return ""
