"""Forms of pytest and assert problems: each test runs as its author meant it, and nothing else is the judge."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from megatron_klear.reward import AnswerFormat, BadTestsError, CodeGraderPool, parse_problem

ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"

CASE = """
import unittest
class TestA(unittest.TestCase):
    def setUp(self):
        self.value = 3
    def test_a(self):
        self.assertEqual(add(1, 2), self.value)
"""
STACKED = """
import pytest
@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", [3, 4])
def test_a(a, b):
    assert add(a, b) == a + b
"""
SETUP = """
class TestA:
    def setup_method(self, method):
        self.value = 3
    def test_a(self):
        assert add(1, 2) == self.value
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[CodeGraderPool]:
    with CodeGraderPool(workers=1, sandbox="rlimits", answer_format=AnswerFormat(require_think=False)) as made:
        yield made


def outcome(pool: CodeGraderPool, program: str, **problem: object) -> str:
    (grade,) = pool.grade_many([("answer", f"```python\n{program}\n```", json.dumps(problem))])
    return grade.outcome


@pytest.mark.parametrize("code", [CASE, STACKED, SETUP], ids=["unittest", "stacked", "setup_method"])
def test_tests_run_as_they_are_written(pool: CodeGraderPool, code: str) -> None:
    assert outcome(pool, ADD, kind="pytest", code=code) == "correct"
    assert outcome(pool, WRONG, kind="pytest", code=code) == "wrong"


@pytest.mark.parametrize(
    "code",
    ["async def test_a():\n    assert add(1, 2) == 3\n", "def test_a():\n    assert add(1, 2) == 3\n    yield\n"],
)
def test_tests_whose_call_asserts_nothing_are_refused(code: str) -> None:
    with pytest.raises(BadTestsError, match="test_a is async or yields"):
        parse_problem(json.dumps({"kind": "pytest", "code": code}))


def test_a_generator_within_a_test_is_none() -> None:
    code = "def test_a():\n    def inner():\n        yield 1\n    assert add(*inner(), 2) == 3\n"
    assert len(parse_problem(json.dumps({"kind": "pytest", "code": code})).messages()) == 1


def test_an_answer_does_not_bring_what_judges_it(pool: CodeGraderPool) -> None:
    lying = "class math:\n    isclose = staticmethod(lambda a, b: True)\ndef add(a, b):\n    return 0\n"
    assert outcome(pool, lying, kind="assert", tests=["assert math.isclose(add(1, 2), 3)"]) == "wrong"
    endless = "class P:\n    def __iter__(self):\n        return iter(range(10**9))\n"
    endless += "    def __len__(self):\n        return 4\ndef primes(n):\n    return P()\n"
    assert outcome(pool, endless, kind="assert", tests=["assert 5 in primes(10)"]) == "wrong"
