"""Answers to LiveCodeBench rows meet what its own harness gives them: names, methods first, deep recursion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.evaluation import read_benchmark
from megatron_klear.reward import AnswerFormat, CodeGraderPool


@pytest.fixture(scope="module", params=["bubblewrap", "rlimits"])
def pool(request: pytest.FixtureRequest) -> Iterator[CodeGraderPool]:
    if request.param == "bubblewrap":
        request.getfixturevalue("bubblewrap")
    plain = AnswerFormat(require_think=False)
    with CodeGraderPool(workers=1, sandbox=request.param, answer_format=plain) as made:
        yield made


def reference(tmp_path: Path, testtype: str, given: str, output: str, function: str = "") -> str:
    """The tests of one published row, as they are read."""
    row = {
        "question_content": "?", "question_id": "1", "contest_date": "2025-01-01", "private_test_cases": "[]",
        "starter_code": f"class Solution:\n    def {function}(self" if function else "",
        "metadata": json.dumps({"func_name": function} if function else {}),
        "public_test_cases": json.dumps([{"input": given, "output": output, "testtype": testtype}]),
    }  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    return read_benchmark(file, setting="benchmarks.files")[0].reference


def reason(pool: CodeGraderPool, answer: str, tests: str) -> str:
    (grade,) = pool.grade_many([("answer", f"```python\n{answer}\n```", tests)])
    assert grade.outcome in ("correct", "wrong")
    return grade.reason if grade.outcome == "wrong" else ""


EXPRESSIONS: list[tuple[str, Any]] = [
    ("random.randint(3, 3)", 3),
    ("copy.deepcopy([1])", [1]),
    ("bisect.bisect_left([1, 2], 2)", 1),
    ("datetime.datetime(2020, 1, 2).day", 2),
    ("bisect_left([1, 2], 2) + gcd(4, 6) + len(deepcopy([1]))", 4),  # the names alone, as well
    ("sorted(Counter('aab').items())", [["a", 2], ["b", 1]]),
    ("statistics.mean([1, 3]) + operator.add(1, 1) + math.pow(2, 1)", 6),
    ("pow(3, 2, 5) + abs(-1)", 5),  # the builtins, not those of math and operator
    ("eval(compile('1 + 1', '', 'eval'))", 2),
    ("[List[int] is not None, inf > 1, re.sub('a', 'b', 'a'), string.digits[:2]]", [True, True, "b", "01"]),
    ("json.loads(dumps([1])) + list(itertools.chain([2])) + [reduce(add, [1, 2])]", [1, 2, 3]),
    ("functools.reduce(lambda a, b: a + b, heapq.nsmallest(2, [3, 1, 2]))", 3),
    ("io.StringIO('x').read() + StringIO('y').read() + type(collections.deque()).__name__", "xydeque"),
]


@pytest.mark.parametrize(("expression", "value"), EXPRESSIONS)
def test_names_that_no_answer_imports(pool: CodeGraderPool, tmp_path: Path, expression: str, value: Any) -> None:
    call = reference(tmp_path, "functional", "0", json.dumps(value), "f")
    assert reason(pool, f"class Solution:\n    def f(self, n):\n        return {expression}", call) == ""
    printed = reference(tmp_path, "stdin", "", json.dumps(value))
    assert reason(pool, f"print(json.dumps({expression}))", printed) == ""


def test_forty_thousand_calls_deep(pool: CodeGraderPool, tmp_path: Path) -> None:
    call = reference(tmp_path, "functional", "40000", "40000", "f")
    assert (
        reason(pool, "class Solution:\n    def f(self, n):\n        return 1 + self.f(n - 1) if n else 0", call) == ""
    )
    printed = reference(tmp_path, "stdin", "40000\n", "40000\n")
    assert reason(pool, "def f(n):\n    return 1 + f(n - 1) if n else 0\nprint(f(int(input())))", printed) == ""
    # Calls through C take room on the stack, too.
    cached = "@cache\ndef f(n):\n    return 1 + f(n - 1) if n else 0\nprint(f(int(input())))"
    assert reason(pool, cached, reference(tmp_path, "stdin", "20000\n", "20000\n")) == ""


@pytest.mark.parametrize(
    ("function", "arguments", "value", "answer"),
    [
        ("search", "[1, 2]\n2", 1, "class Solution:\n    def search(self, xs, x): return xs.index(x)"),
        ("combinations", "5\n2", 10, "class Solution:\n    def combinations(self, n, k): return comb(n, k)"),
        ("product", "[2, 3]", 6, "class Solution:\n    def product(self, xs): return prod(xs)"),
        ("combinations", "[1, 2]", 1, "class Solution:\n    def combinations(s, x): return len([*combinations(x, 2)])"),
        ("gcd", "4\n6", 2, "def gcd(a, b):\n    return gcd(b, a % b) if b else a"),
        ("gcd", "4\n6", 2, "def gcd(a, b): return 0\nclass Solution:\n    def gcd(self, a, b): return 2"),
        ("sum", "4\n6", 10, "def sum(a, b): return a + b\nclass Solution: pass"),
    ],
)  # fmt: skip
def test_a_method_of_solution_comes_before_a_name_that_is_given(
    pool: CodeGraderPool, tmp_path: Path, function: str, arguments: str, value: Any, answer: str
) -> None:
    tests = reference(tmp_path, "functional", arguments, json.dumps(value), function)
    assert reason(pool, answer, tests) == ""
    # What is given to every answer is nobody's answer.
    assert f"the answer defines no function {function}" in reason(pool, "x = 1", tests)
