r"""Answers whose grades are known, to tell whether graders and settings do what they should.

Every probe is written for the default markers; `rewritten` puts other markers in.
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

from megatron_klear.records import Domain, FinishReason, Outcome
from megatron_klear.reward.answers import last_box
from megatron_klear.reward.textual import choice_letter, words

Form = Literal["correct", "partial", "wrong", "no answer", "cut off", "cut off thinking", "untagged"]


class Probe(NamedTuple):
    """One response and what a grader must say of it.

    Attributes:
        name: for people.
        expected: the outcomes that are right; all others are faults.
    """

    name: str
    domain: Domain
    response: str
    reference: str
    expected: tuple[Outcome, ...]
    finish_reason: FinishReason = "stop"


def boxed(answer: str) -> str:
    """A finished math response with this answer."""
    return rf"<think>t</think>\boxed{{{answer}}}"


def fenced(code: str) -> str:
    """A finished code response with this program."""
    return f"<think>t</think>\n```python\n{code}\n```"


_TWO_TESTS = json.dumps(
    {"kind": "stdin", "tests": [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "4\n"}]}
)
_ONE_TEST = json.dumps({"kind": "stdin", "tests": [{"input": "", "output": "1"}]})
_CALL = json.dumps({"kind": "call", "function": "twice", "tests": [{"args": [n], "output": 2 * n} for n in (1, 5)]})
_ASSERT = json.dumps({"kind": "assert", "tests": ["assert twice(1) == 2", "assert twice(5) == 10"]})

FORMS: dict[Domain, dict[Form, tuple[str, FinishReason]]] = {
    "math": {
        "correct": (boxed("7"), "stop"),
        "wrong": (boxed("8"), "stop"),
        "no answer": ("<think>t</think>It is 7.", "stop"),
        "cut off": ("<think>t</think>So the answer is", "length"),
        "cut off thinking": (r"<think>so \boxed{7}", "length"),
        "untagged": (r"\boxed{8}", "stop"),
    },
    "code": {
        "correct": (fenced("print(2 * int(input()))"), "stop"),
        "partial": (fenced("print(2)"), "stop"),
        "wrong": (fenced("print(0)"), "stop"),
        "no answer": ("<think>t</think>print(2 * int(input()))", "stop"),
        "cut off": ("<think>t</think>\n```python\nprint(2 * int(input()))", "length"),
        "cut off thinking": ("<think>\n```python\nprint(2 * int(input()))\n```", "length"),
        "untagged": ("```python\nprint(0)\n```", "stop"),
    },
}
"""A response of every form, by domain; its finish reason."""

FORM_REFERENCE: dict[Domain, str] = {"math": "7", "code": _TWO_TESTS}

_MATH_EQUAL = r"""
42 | 42 || 1/2 | 0.5 || \frac{1}{2} | \frac{2}{4} || 1,000 | 1000 || \sqrt{8} | 2\sqrt{2} || \{1,2\} | \{2,1\}
(1,2] | (1,2] || (-\infty,2] | x \le 2 || 5\text{ cm} | 5 || 50\% | 50\% || C | (C) || (C) | \text{C} || \pi | \pi
x^2+2x+1 | (x+1)^2 || \text{Monday} | Monday || 2\frac{1}{2} | 2.5 || 10^{-3} | 0.001 || 5 | x=5 || (2,1) | (2,1)
"""
_MATH_DIFFERENT = r"""
42 | 43 || 42 | -42 || 1/2 | 1/3 || \{1,2\} | \{1,3\} || (1,2] | [1,2] || C | D || C | A, B, C, D || \pi | 3.14
5\text{ cm} | 6\text{ cm} || (2,1) | (1,2) || \text{Monday} | Sunday || 1,2 | 1 || 10^{-8} | 2\times 10^{-8}
"""


def built_in(domains: frozenset[Domain]) -> list[Probe]:
    """The probes that come with the project, of some domains."""
    probes = []
    for table, outcome in ((_MATH_EQUAL, "correct"), (_MATH_DIFFERENT, "wrong")):
        for cell in (cell for line in table.strip().splitlines() for cell in line.split("||")):
            reference, answer = (part.strip() for part in cell.split(" | "))
            probes.append(Probe(f"{answer} for {reference}", "math", boxed(answer), reference, (outcome,)))  # type: ignore[arg-type]
    for name, reference, good, bad in (
        ("a program", _TWO_TESTS, "print(2 * int(input()))", "import os\nos._exit(0)"),
        ("a function", _CALL, "def twice(n):\n    return 2 * n", "def twice(n):\n    return n + n if n > 9 else 0"),
        ("assertions", _ASSERT, "def twice(n):\n    return 2 * n", _ALWAYS_EQUAL),
    ):
        probes.append(Probe(f"{name}, right", "code", fenced(good), reference, ("correct",)))
        probes.append(Probe(f"{name}, wrong", "code", fenced(bad), reference, ("wrong",)))
    probes.append(Probe("a program, half right", "code", fenced("print(2)"), _TWO_TESTS, ("partial", "wrong")))
    probes.append(Probe("a loop without end", "code", fenced("while True: pass"), _ONE_TEST, ("wrong",)))
    probes += [Probe("an unusable answer key", "math", boxed("5"), "???", ("ungraded",))]
    probes += [Probe("unusable tests", "code", fenced("print(1)"), '{"kind": "stdin", "tests": []}', ("ungraded",))]
    return [probe for probe in probes if probe.domain in domains]


_ALWAYS_EQUAL = "class A:\n    def __eq__(self, other):\n        return True\ndef twice(n):\n    return A()"

_LAST_NUMBER = re.compile(r"(\d+)((?:\.\d+)?)(?!.*\d)", re.DOTALL)


def perturbed(reference: str) -> str:
    """Another answer in the same notation: the next letter of a choice, other words, the last number larger by one."""
    inner, _ = last_box(reference)
    text = reference if inner is None else inner
    letter = choice_letter(text)
    if letter is not None:
        return chr(ord("A") + (ord(letter) - ord("A") + 1) % 5)
    if words(text) is not None:
        return "neither of these"
    if _LAST_NUMBER.search(text):
        return _LAST_NUMBER.sub(lambda match: f"{int(match.group(1)) + 1}{match.group(2)}", text)
    return f"{text} + 1"


def in_lines(response: str) -> str:
    """The response as chat templates set it: the markers on lines of their own, then an empty line."""
    thinking, answer = response.removeprefix("<think>").split("</think>")
    return f"<think>\n{thinking}\n</think>\n\n{answer.lstrip()}"


def rewritten(response: str, think_start: str, think_end: str) -> str:
    """The response with other markers."""
    return response.replace("<think>", think_start).replace("</think>", think_end)
