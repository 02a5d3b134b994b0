"""Programs against tests of every kind: pass rates, rewards, HumanEval, attempts to cheat, and bad input."""

# ruff: noqa: E501 - programs in one line each
from __future__ import annotations

import json
import os
from typing import Any

import pytest

from megatron_klear.errors import ConfigError, RewardError
from megatron_klear.records import Outcome
from megatron_klear.reward import (
    AnswerFormat,
    CodeGraderPool,
    CodeRewardRules,
    GradeRequest,
    Limits,
    code,
    count_outcomes,
    grade_code,
)
from tests.reward.conftest import STRICT_LIMITS, human_eval, prints, program

SQUARES = json.dumps({"kind": "stdin", "tests": [{"input": f"{i}\n", "output": f"{i * i}\n"} for i in range(16)]})
ADD = {"kind": "call", "function": "add", "tests": [{"args": [i, 2], "output": i + 2} for i in range(4)]}


def asserts(*tests: str, **more: Any) -> str:
    return json.dumps({"kind": "assert", "tests": tests, **more})


def graded(pool: CodeGraderPool, reference: str, *codes: str) -> list[tuple[Outcome, float]]:
    requests = [(str(i), program(text), reference) for i, text in enumerate(codes)]
    return [(grade.outcome, grade.reward) for grade in pool.grade_many(requests)]


def test_the_reward_is_the_share_of_tests_passed(code_graders: CodeGraderPool) -> None:
    """Section 3.2.4: 4 of 16 tests are worth 0.25."""
    right = "n = int(input())\nprint(n * n)"
    some = "n = int(input())\nprint(n * n if n < 4 else 0)"
    none = "print(-1)"
    assert graded(code_graders, SQUARES, right, some, none) == [("correct", 1.0), ("partial", 0.25), ("wrong", 0.0)]
    reason = code_graders.grade_many([("a", program(some), SQUARES)])[0].reason
    assert reason == "passed 4 of 16 tests; test 5: line 1 is '0', expected '16'"


def test_all_or_nothing_stops_at_the_first_failure_and_scores_the_same_as_without_stopping(bubblewrap: str) -> None:
    some = "n = int(input())\nprint(n * n if n < 4 else 0)"
    slow = "n = int(input())\nwhile n > 0: pass\nprint(0)"
    rules = CodeRewardRules(score="hard", correct=2.0, wrong=-1.0, malformed=-1.5)
    with CodeGraderPool(workers=1, rules=rules, limits=STRICT_LIMITS) as pool:
        assert graded(pool, SQUARES, "print(int(input()) ** 2)", some, slow) == [
            ("correct", 2.0), ("wrong", -1.0), ("wrong", -1.0),
        ]  # fmt: skip
        assert pool.grade_many([("a", "no tags", SQUARES)])[0].reward == -1.5
        reason = pool.grade_many([("a", program(slow), SQUARES)])[0].reason
    assert "test 2: time limit" in reason


def test_time_limits_end_no_response_whose_score_they_would_change(bubblewrap: str) -> None:
    loops = "n = int(input())\nwhile n % 8 == 1: pass\nprint(n * n)"
    with CodeGraderPool(workers=1, limits=STRICT_LIMITS) as pool:
        ((outcome, reward),) = graded(pool, SQUARES, loops)
    assert (outcome, reward) == ("partial", 14 / 16)


def test_rewards_between_other_ends() -> None:
    rules = CodeRewardRules(correct=3.0, wrong=-1.0, malformed=-2.0)
    verdicts = [("correct", 1.0), ("partial", 0.25), ("wrong", 0.0), ("malformed", None), ("ungraded", None)]
    rewards = [rules.grade(code.Verdict(outcome, "", rate)).reward for outcome, rate in verdicts]
    assert rewards == [3.0, 0.0, -1.0, -2.0, 0.0]
    with pytest.raises(ConfigError, match=r"code_reward\.malformed"):
        CodeRewardRules(malformed=0.5)
    with pytest.raises(ConfigError, match=r"code_reward\.correct"):
        CodeRewardRules(correct=0.0)


def test_functions(code_graders: CodeGraderPool) -> None:
    reference = json.dumps(ADD)
    assert graded(
        code_graders,
        reference,
        "def add(a, b):\n    return a + b",
        "class Solution:\n    def add(self, a, b):\n        print('noise')\n        return a + b",
        "def add(a, b):\n    return a + b if a else None",
        "def other(a, b):\n    return a + b",
        "def add(a, b):\n    raise SystemExit(0)",
        "def add(a, b):\n    return str(a + b)",
        "def add(a, b):\n    return object()",
    ) == [
        ("correct", 1.0), ("correct", 1.0), ("partial", 0.75), ("wrong", 0.0), ("wrong", 0.0), ("wrong", 0.0),
        ("wrong", 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("returned", "expected", "outcome"),
    [
        ("(1, [2, {3}])", [1, [2, [3]]], "correct"),
        ("{'a': 1, 2: (3,)}", {"a": 1, "2": [3]}, "correct"),
        ("range(3)", [0, 1, 2], "correct"),
        ("0.1 + 0.2", 0.3, "correct"),
        ("2", 2.0, "correct"),
        ("1 + 1e-3", 1.0, "wrong"),
        ("True", 1, "wrong"),
        ("1", True, "wrong"),
        ("None", None, "correct"),
        ("None", 0, "wrong"),
        ("float('nan')", 1.0, "wrong"),
        ("10 ** 30", 10**30, "correct"),
        ("10 ** 30 + 1", 10**30, "wrong"),
        ("10 ** 400", 1.5, "wrong"),
        ("'a'", "a", "correct"),
        ("[1, 2]", [1, 2, 3], "wrong"),
        ("x", 1, "wrong"),
    ],
)
def test_results_are_compared_as_data(code_graders: CodeGraderPool, returned: str, expected: Any, outcome: str) -> None:
    reference = json.dumps({"kind": "call", "function": "f", "tests": [{"output": expected}]})
    x = "x = []\nx.append(x)\n"
    assert graded(code_graders, reference, f"{x}def f():\n    return {returned}")[0][0] == outcome


def test_assertions_and_test_functions(code_graders: CodeGraderPool) -> None:
    answer = (
        "import math\nfrom collections import Counter\nclass Full(ValueError):\n    pass\n"
        "class Stack:\n    def __init__(self, size=2):\n        self.items, self.size = [], size\n"
        "    def push(self, x):\n        if len(self.items) == self.size: raise Full('full')\n        self.items.append(x)\n"
        "    def __len__(self):\n        return len(self.items)\n    def __eq__(self, other):\n"
        "        return self.items == other.items\n"
        "def rotate(items):\n    items.append(items.pop(0))\n"
        "def apply(f, x):\n    return f(f(x))\n"
        "def numbers():\n    yield 1\n    yield 2\n"
        "def kinds():\n    return {1, 2}, (1, 'a'), {'k': [1.5, None]}, b'x', Counter('aab'), 1j\n"
    )
    good = [
        "s = Stack()\ns.push(1)\nassert len(s) == 1 and s.items == [1] and isinstance(s, Stack)",
        "import pytest\nwith pytest.raises(Full, match='full'):\n    s = Stack(0)\n    s.push(1)",
        "with __import__('pytest').raises(ValueError):\n    Stack(0).push(1)",
        "try:\n    Stack(0).push(1)\n    assert False\nexcept Full:\n    pass",
        "assert Stack() == Stack() and Stack() != 5",
        "x = [1, 2, 3]\nassert rotate(x) is None\nassert x == [2, 3, 1]",
        "assert apply(lambda v: v * 3, 2) == 18",
        "assert list(numbers()) == [1, 2] and next(numbers()) == 1",
        "assert kinds() == ({1, 2}, (1, 'a'), {'k': [1.5, None]}, b'x', {'a': 2, 'b': 1}, 1j)",
        "def test_a():\n    assert math.sqrt(4) == 2",
        "class TestStack:\n    def setup_method(self):\n        self.s = Stack()\n    def test_empty(self):\n"
        "        assert len(self.s) == 0",
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(len(Stack()), 0)",
        "import pytest\n@pytest.mark.parametrize('n,m', [(1, 1), (2, 2)])\ndef test_p(n, m):\n    assert n == pytest.approx(m)",
    ]
    bad = [
        "assert len(Stack()) == 1",
        "def test_a():\n    assert False",
        "class TestStack:\n    def test_empty(self):\n        assert Stack().missing == 0",
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(len(Stack()), 1)",
        "with __import__('pytest').raises(KeyError):\n    Stack(0).push(1)",
        "@__import__('pytest').mark.parametrize('n', [1, 2])\ndef test_p(n):\n    assert n == 1",
        "f = Stack\nraise SystemExit(0)",
        "undefined_name",
    ]
    assert graded(code_graders, asserts(*good), answer) == [("correct", 1.0)]
    for test in bad:
        assert graded(code_graders, asserts(test), answer) == [("wrong", 0.0)], test
    file = "def helper(x):\n    return x\n" + "\n".join(good[9:11]) + "\ndef test_b():\n    assert helper(1) == 2\n"
    reference = json.dumps({"kind": "pytest", "code": file, "preamble": "import math"})
    ((outcome, reward),) = graded(code_graders, reference, answer)
    assert (outcome, reward) == ("partial", pytest.approx(2 / 3))


CHEATS = {
    "equal to everything": (
        "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "    def __bool__(self): return True\n    def __sub__(self, o): return 0\n    __rsub__ = __sub__\n"
        "    def __abs__(self): return 0\n    def __lt__(self, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\n"
        "    def __hash__(self): return 0\n    def __contains__(self, o): return True\n"
        "def f(x): return A()"
    ),
    "equal integer": "class A(int):\n    def __eq__(self, o): return True\n    __ne__ = lambda s, o: False\ndef f(x): return A(1)",
    "exit at once": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x):\n    print('passed')\n    os._exit(0)",
    "system exit": "def f(x):\n    raise SystemExit(0)",
    "says passed": "import os\nfor fd in range(10):\n    try: os.write(fd, b'passed')\n    except OSError: pass\ndef f(x): return 0",
    "patched builtins": (
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = type('E', (), {})\n"
        "def abs(x): return 0\ndef isinstance(*a): return True\ndef len(x): return 7\ndef f(x): return 0"
    ),
    "looks for the expected value": (
        "import gc, sys\nneedle = '-'.join(['marker', 'of', 'the', 'test'])\n"
        "def known(v):\n    if isinstance(v, dict): return any(map(known, list(v.values()))) if '__name__' not in v else False\n"
        "    return isinstance(v, (str, bytes)) and needle in str(v) and len(v) > len(needle)\n"
        "def f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if any(map(known, frame.f_locals.values())): return 7\n        frame = frame.f_back\n"
        "    for o in gc.get_objects():\n        if isinstance(o, (dict, list, tuple)):\n"
        "            if any(map(known, o.values() if isinstance(o, dict) else o)): return 7\n    return 0"
    ),
    "answers as the test's process": (
        "import os, struct, json\nos.write(4, struct.pack('<Q', 12) + b'[\"=\", [7, []]')\ndef f(x): return 0"
    ),
    "its own library": (
        "class Anything:\n    def __getattr__(self, name): return lambda *a, **k: 0\n"
        "def isclose(*a, **k): return True\ndef Counter(x): return 0\ndef Decimal(x): return 0\ndef sorted(x): return 0\n"
        "math = datetime = collections = Anything()\npi = 0\ndef f(x): return 0"
    ),
    "endless": "def f(x):\n    while True: pass",
}


@pytest.mark.parametrize("name", list(CHEATS))
def test_assertions_cannot_be_cheated(code_graders: CodeGraderPool, name: str) -> None:
    tests = ["assert f(1) == 7", "assert abs(f(1) - 7) < 1e-6", "assert not (f(1) != 7)", "assert f(1) in (7, 8)"]
    tests += ["assert isinstance(f(1), int) and f(1) > 6", "assert len(f([1, 2])) == 7"]
    # Names that tests use without importing them.
    tests += ["assert isclose(f(1), 7)", "assert math.isclose(f(1), 7)", "assert Counter([f(1)]) == Counter([7])"]
    tests += ["assert Decimal(f(1)) == Decimal(7)", "assert collections.Counter([f(1)]) == collections.Counter([7])"]
    tests += [
        "assert f(1) == datetime.date(2020, 1, 7).day",
        "assert sorted([f(1), 1]) == [1, 7]",
        "assert f(1) > 2 * pi",
    ]
    tests = tests[:1] if name == "endless" else tests
    assert graded(code_graders, asserts(*tests, setup="# marker-of-the-test"), CHEATS[name]) == [("wrong", 0.0)]
    right = [test for test in tests if "len" not in test]
    assert graded(code_graders, asserts(*right), "def f(x): return 7") == [("correct", 1.0)]


def test_human_eval(bubblewrap: str) -> None:
    """Canonical solutions are worth exactly 1.0, and each with `pass` in place of its body less."""
    requests = []
    for row in human_eval():
        reference = asserts(f"check({row['entry_point']})", setup=row["test"])
        solution = program(row["prompt"] + row["canonical_solution"])
        requests.append(GradeRequest(f"{row['task_id']} solution", solution, reference))
        requests.append(GradeRequest(f"{row['task_id']} pass", program(row["prompt"] + "    pass\n"), reference))
    with CodeGraderPool(workers=2) as pool:
        grades = pool.grade_many(requests)
    assert len(requests) == 328
    rewards = {request.request_id: grade for request, grade in zip(requests, grades, strict=True)}
    assert {name: g for name, g in rewards.items() if name.endswith("solution") and g.reward != 1.0} == {}
    assert {name: g for name, g in rewards.items() if name.endswith("pass") and g.reward >= 1.0} == {}
    assert count_outcomes(grades)["ungraded"] == 0


@pytest.mark.parametrize(
    ("response", "outcome", "why"),
    [
        ("```python\nprint(1)\n```", "malformed", "<think> is missing"),
        ("<think>```python\nprint(1)\n```", "malformed", "</think> is missing"),
        ("<think>```python\nprint(1)\n```</think>no code", "wrong", "no fenced code block"),
        ("<think>t</think>```python\nprint(1)", "wrong", "not closed"),
        ("<think>t</think>\n```python\nprint(1)\n```\nor\n```python\nprint(2)\n```", "wrong", "'2'"),
        ("<think>t</think>\n```text\nprint(1)\n```", "wrong", "not Python"),
        ("<think>t</think>\n```python\n\n```", "wrong", "empty"),
        (program("print(1"), "wrong", "SyntaxError"),
        (program("print(1)\0"), "wrong", "null bytes"),
        (program("print('\ud800')"), "wrong", "UnicodeEncodeError"),
        (program("x = '" + "a" * 70_000 + "'"), "wrong", "characters, more than"),
        (program("print(1)") + "x" * 10_000_000, "correct", "passed"),
        (program("(" * 5000 + ")" * 5000), "wrong", ""),
        (program("from __future__ import annotations\nprint(1)"), "correct", "passed"),
        (program("\ufeffprint(1)"), "wrong", "SyntaxError"),
        (None, "ungraded", "NoneType"),
        (b"bytes", "ungraded", "bytes"),
    ],
)
def test_bad_responses_are_named_outcomes(code_graders: CodeGraderPool, response: Any, outcome: str, why: str) -> None:
    (grade,) = code_graders.grade_many([("a", response, prints("1"))])
    assert grade.outcome == outcome, grade
    assert why in grade.reason


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "should be an object"),
        ("{}", "kind"),
        ('{"kind": "shell"}', "shell"),
        ('{"kind": "stdin"}', "tests: Field required"),
        ('{"kind": "stdin", "tests": []}', "tests: List should have at least 1 item"),
        ('{"kind": "stdin", "tests": [{"input": "1"}]}', "tests.0.output: Field required"),
        ('{"kind": "stdin", "tests": [{"input": 1, "output": "1"}]}', "tests.0.input: Input should be a valid string"),
        ('{"kind": "stdin", "tests": [{"input": "", "output": ""}], "preambel": ""}', "preambel: Unexpected keyword"),
        ('{"kind": "call", "function": "a b", "tests": [{"output": 1}]}', "function: String should match"),
        ('{"kind": "call", "function": "f", "tests": [{"args": 1, "output": 1}]}', "tests.0.args"),
        ('{"kind": "assert", "tests": ["assert ("]}', "tests.0: is not Python"),
        ('{"kind": "assert", "tests": ["# nothing"]}', "tests.0: holds no code"),
        ('{"kind": "pytest", "code": "x = 1"}', "defines no function test_"),
        ('{"kind": "stdin", "tests": [{"input": "\\ud800", "output": ""}]}', "hex escape"),
        ("[" * 100_000, "JSON"),
        (7, "reference is int"),
        (None, "reference is NoneType"),
    ],
)
def test_bad_tests_are_ungraded_for_every_response(code_graders: CodeGraderPool, reference: Any, why: str) -> None:
    requests = [("a", program("print(1)"), reference), ("b", "malformed", reference)]
    grades = code_graders.grade_many(requests)
    assert {grade.outcome for grade in grades} == {"ungraded"}
    assert why in grades[0].reason, grades[0].reason


def test_megabytes_go_in_and_come_out(bubblewrap: str) -> None:
    text = "x" * 999 + "\n"
    reference = json.dumps({"kind": "stdin", "tests": [{"input": text * 10_000, "output": text * 10_000}]})
    with CodeGraderPool(workers=1, limits=Limits(output_bytes=2**24)) as pool:
        assert graded(pool, reference, "import sys\nsys.stdout.write(sys.stdin.read())") == [("correct", 1.0)]
    with CodeGraderPool(workers=1, limits=Limits(output_bytes=2**20)) as pool:
        ((outcome, _),) = graded(pool, reference, "import sys\nsys.stdout.write(sys.stdin.read())")
    assert outcome == "wrong"


def test_interrupted_and_cut_off(code_graders: CodeGraderPool) -> None:
    requests = [
        GradeRequest("a", program("print(1)"), prints("1"), "abort"),
        GradeRequest("b", "<think>t</think>\n```python\nprint(1)", prints("1"), "length"),
        GradeRequest("c", program("print(1)") + "and", prints("1"), "length"),
    ]
    grades = code_graders.grade_many(requests)
    assert [grade.outcome for grade in grades] == ["ungraded", "wrong", "correct"]
    assert "token limit" in grades[1].reason
    with pytest.raises(RewardError, match="share the id"):
        code_graders.grade_many([requests[0], requests[0]])
    assert code_graders.grade_many([]) == []


def test_one_response(bubblewrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grade = grade_code(program("print(1)"), prints("1"))
    assert (grade.outcome, grade.reward) == ("correct", 1.0)
    bare = AnswerFormat(require_think=False)
    assert grade_code("```\nprint(2)\n```", prints("1"), answer_format=bare).outcome == "wrong"
    assert (
        grade_code(program("print(2)"), prints("1"), rules=CodeRewardRules(wrong=-1.0, malformed=-1.0)).reward == -1.0
    )
    broken = CodeGraderPool(workers=1, python="/nonexistent")
    monkeypatch.setattr(code, "_shared", (os.getpid(), broken))
    failed = grade_code(program("print(1)"), prints("1"))
    assert (failed.outcome, failed.reward) == ("ungraded", 0.0)
    assert "/nonexistent" in failed.reason
    broken.close()
