"""Whose the names of tests are: what judges is the problem's, what is asked for is the answer's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_klear.reward import AnswerFormat, BadTestsError, CodeGraderPool, parse_problem
from megatron_klear.reward.code_names import names_of_tests


@pytest.fixture(scope="module")
def pool() -> Iterator[CodeGraderPool]:
    with CodeGraderPool(workers=1, sandbox="rlimits", answer_format=AnswerFormat(require_think=False)) as made:
        yield made


def outcome(pool: CodeGraderPool, answer: str, *tests: str, **more: Any) -> str:
    reference = json.dumps({"kind": "assert", "tests": tests, **more})
    (grade,) = pool.grade_many([("answer", f"```python\n{answer}\n```", reference)])
    return f"{grade.outcome}: {grade.reason}" if grade.outcome == "ungraded" else grade.outcome


@pytest.mark.parametrize(
    ("preamble", "test", "cheat"),
    [
        ("from math import isclose", "assert isclose(f(2), 1.41421356)", "def isclose(*a, **k): return True"),
        ("from math import *", "assert isclose(f(2), 1.41421356)", "def isclose(*a, **k): return True"),
        ("import math as m", "assert m.isclose(f(2), 1.41421356)", "class m:\n    isclose = lambda *a: True"),
        ("import math", "assert math.isclose(f(2), 1.41421356)", "import cmath as math"),
        ("", "assert isclose(f(2), 1.41421356)", "def isclose(*a, **k): return True"),
        ("", "assert Counter(f(2)) == Counter([1, 2])", "def Counter(x): return 0"),
        ("", "assert f(2) == Decimal('1.5')", "def Decimal(x): return 0"),
        ("", "assert f(2) == datetime.date(2020, 1, 2)", "class datetime:\n    date = lambda *a: 0"),
        ("", "assert f(2) == datetime(2020, 1, 2)", "def datetime(*a): return 0"),
        ("", "assert f(2) == math.e", "class math:\n    e = 0"),
        ("", "pytest.fail(str(f(2)))", "class pytest:\n    fail = lambda *a: None"),
        ("LIMIT = 7", "assert f(2) == LIMIT", "LIMIT = 0"),
        ("try:\n    from math import isclose\nexcept ImportError:\n    pass", "assert isclose(f(2), 1.41421356)",
         "def isclose(*a, **k): return True"),
        ("if True:\n    same = lambda a, b: a == b", "assert same(f(2), 3)", "def same(a, b): return True"),
    ],
)  # fmt: skip
def test_an_answer_does_not_bring_what_judges_it(pool: CodeGraderPool, preamble: str, test: str, cheat: str) -> None:
    assert outcome(pool, f"{cheat}\ndef f(x): return 0", test, preamble=preamble) == "wrong"
    code = f"def test_a():\n    {test}\n"
    cheating = f"```python\n{cheat}\ndef f(x): return 0\n```"
    reference = json.dumps({"kind": "pytest", "code": code, "preamble": preamble})
    assert [g.outcome for g in pool.grade_many([("answer", cheating, reference)])] == ["wrong"]


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ("from math import sqrt\ndef f(x): return sqrt(x)", ["assert isclose(f(2), 1.41421356, rel_tol=1e-6)"]),
        ("def f(x): return [1, 1]", ["assert Counter(f(1)) == Counter({1: 2}) and f(1) == [*deque([1, 1])]"]),
        ("import datetime\ndef f(x): return datetime.date(x, 1, 2)", ["assert f(2020) == datetime.date(2020, 1, 2)"]),
        (
            "from datetime import datetime, timedelta, timezone\n"
            "def f(x): return datetime(x, 1, 2, 3, 4, 5, 6)\ndef g(t): return t + timedelta(days=1)\n"
            "def h(): return datetime(2020, 1, 1, tzinfo=timezone.utc), timedelta(1, 2, 3)",
            [
                "assert f(2020) == datetime(2020, 1, 2, 3, 4, 5, 6) and g(date(2020, 1, 1)) == date(2020, 1, 2)",
                "import datetime as d\nassert h()[0] == d.datetime(2020, 1, 1, tzinfo=d.timezone.utc)",
                "assert h()[1] == timedelta(1, 2, 3)",
            ],
        ),
        ("from decimal import Decimal\ndef f(x): return Decimal(x) / 2", ["assert f(3) == Decimal('1.5')"]),
        # A function that is called as a builtin, or as one of the library.
        ("def sum(a, b): return a + b", ["assert sum(1, 2) == 3", "assert abs(sum(1, 2) - 3) == 0"]),
        ("def reduce(x): return x - 1", ["assert reduce(2) == 1"]),
        ("class Counter:\n    n = 0\n    def up(self): self.n += 1", ["c = Counter()\nc.up()\nassert c.n == 1"]),
        ("def max(a): return a[0]", ["def check(f):\n    assert f([1, 2]) == 1\ncheck(max)"]),
        ("def copy(x): return x", ["assert copy(2) == 2"]),
        ("def len_of(x): return len(x)\ndef len(x): return 9", ["assert len_of([1]) == 9 and len([1, 2]) == 2"]),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_the_answers(pool: CodeGraderPool, answer: str, tests: list[str]) -> None:
    assert outcome(pool, answer, *tests) == "correct"
    assert outcome(pool, "def unrelated(): pass", *tests) == "wrong"


def test_what_a_preamble_gives_is_no_answer(pool: CodeGraderPool) -> None:
    """All of a module is imported, and one of its names is what the tests are about."""
    gcd = {"preamble": "from math import *"}
    test = "assert gcd(4, 6) == 2"
    assert outcome(pool, "def gcd(a, b): return gcd(b, a % b) if b else a", test, **gcd) == "correct"
    assert outcome(pool, "def gcd(a, b): return 0", test, **gcd) == "wrong"
    assert outcome(pool, "x = 1", test, **gcd) == "wrong"
    assert outcome(pool, "from math import gcd", test, **gcd) == "correct"


def test_a_preamble_may_call_the_answer(pool: CodeGraderPool) -> None:
    drives = {"preamble": "def run(x):\n    return [step(v) for v in x]\n"}
    test = "assert run(list((1, 2))) == [2, 3]"
    assert outcome(pool, "def step(v): return v + 1", test, **drives) == "correct"
    assert outcome(pool, "def step(v): return v\ndef run(x): return [2, 3]", test, **drives) == "wrong"


def test_a_problem_may_say_what_it_asks_for(pool: CodeGraderPool) -> None:
    two = ["assert sorted(list((2, 1))) == [1, 2]"]
    assert "name in defines which is, of list, sorted" in outcome(pool, "x = 1", *two)
    apart = ["assert sum(1, 2) == 3", "assert max(1) == 1"]
    assert "name in defines which is, of max, sum" in outcome(pool, "x = 1", *apart)
    assert "which is, of gcd" in outcome(pool, "x = 1", "assert gcd(4, 6) == 2", preamble="from math import gcd")
    answer = "def sorted(x): return [*reversed(x)]"
    assert outcome(pool, answer, *two, defines=["sorted"]) == "correct"
    assert outcome(pool, "x = 1", *two, defines=["sorted"]) == "wrong"
    both = ["assert f(Counter()) == 'mine'"]
    mine = "class Counter:\n    name = 'mine'\ndef f(c): return c.name"
    assert outcome(pool, mine, *both) == "wrong"
    assert outcome(pool, mine, *both, defines=["Counter"]) == "correct"
    given = {"preamble": "class Box:\n    def get(self): return 1\n"}
    own = "class Box:\n    def get(self): return 2\n"
    assert "which is, of Box" in outcome(pool, own, "assert Box().get() == 2", **given)
    assert outcome(pool, own, "assert Box().get() == 2", **given, defines=["Box"]) == "correct"
    with pytest.raises(BadTestsError, match=r"defines\.0: String should match"):
        parse_problem(json.dumps({"kind": "assert", "tests": two, "defines": ["a b"]}))


def test_names_of_tests() -> None:
    setup = "import json as j\ndef check(candidate):\n    global seen\n    seen = math.floor(candidate(1))\n"
    assert names_of_tests("", setup, ("check(f)",), ()) == ([], [], {"math": "math"})
    assert names_of_tests("def f(): ...", setup, ("check(f)",), ()) == ([], ["f"], {"math": "math"})
    assert names_of_tests("", "", ("assert pow(2, 3) == 8",), ()) == (["pow"], [], {})
    assert names_of_tests("", "", ("assert eval('f(1)') == 8",), ()) == ([], [], {})
    assert names_of_tests("", "", ("assert g(datetime.now(), datetime.min)",), ())[2] == {
        "datetime": "datetime:datetime"
    }
    assert names_of_tests("", "", ("assert g(math.no_such_thing)",), ())[2] == {}
