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


SET_UP_CLASS = """
import unittest
value = None
def setUpModule():
    global value
    value = 1
class AddTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.sum = value + 2
    @classmethod
    def tearDownClass(cls):
        del cls.sum
    def test_a(self):
        self.assertEqual(add(1, 2), self.sum)
    @unittest.skip("not now")
    def test_off(self):
        self.fail()
"""
INHERITED = """
import unittest
class Shared:
    expected = 3
    def test_a(self):
        assert add(1, 2) == self.expected
class TestMore(Shared):
    def setup_class(cls):
        cls.b = 2
    def test_b(self):
        assert add(1, self.b) == 3
class Base(unittest.TestCase):
    def test_c(self):
        self.assertEqual(add(1, 2), 3)
class Derived(Base):
    def test_d(self):
        self.assertEqual(add(2, 2), 4)
"""
MARKED = """
import pytest, unittest
@pytest.mark.slow
@pytest.mark.timeout(5)
def test_a():
    assert add(1, 2) == 3
@pytest.mark.skip(reason="not now")
def test_off():
    assert False
@pytest.mark.skipif(False, reason="never")
@pytest.mark.parametrize("a, b", [pytest.param(1, 2, id="small"), (2, 1)], ids=["x", "y"])
def test_b(a, b):
    assert add(a, b) == 3
class TestC:
    @pytest.mark.parametrize("a", [1, 2])
    def test_c(self, a):
        assert add(a, 1) == a + 1
def test_raises():
    assert add(0, 1) == 1
    pytest.raises(TypeError, add, 1)
"""
HOOKS = """
seen = []
def setup_module(module):
    seen.append("module")
def setup_function():
    seen.append("function")
def test_a():
    assert seen[-1] == "function" and seen.count("module") == 1 and add(1, 2) == 3
class TestA:
    def setup_class(cls):
        cls.value = 3
    def setup_method(self):
        self.more = add(1, self.value)
    def teardown_method(self, method):
        assert method.__name__ == "test_b"
    def test_b(self):
        assert self.more == 4 and seen[0] == "module" and seen.count("module") == 1
"""
FORMS = {
    "unittest": CASE, "stacked": STACKED, "setup_method": SETUP, "setUpClass": SET_UP_CLASS, "inherited": INHERITED,
    "marks": MARKED, "hooks": HOOKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[CodeGraderPool]:
    with CodeGraderPool(workers=1, sandbox="rlimits", answer_format=AnswerFormat(require_think=False)) as made:
        yield made


def outcome(pool: CodeGraderPool, program: str, **problem: object) -> str:
    (grade,) = pool.grade_many([("answer", f"```python\n{program}\n```", json.dumps(problem))])
    return grade.outcome


@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS)
def test_tests_run_as_they_are_written(pool: CodeGraderPool, code: str) -> None:
    assert outcome(pool, ADD, kind="pytest", code=code) == "correct"
    assert outcome(pool, WRONG, kind="pytest", code=code) == "wrong"
    assert outcome(pool, ADD, kind="assert", tests=[code]) == "correct"
    assert outcome(pool, WRONG, kind="assert", tests=[code]) == "wrong"


BROKEN = [
    ({"setup": "import no_such_module"}, "No module named 'no_such_module'"),
    ({"setup": "from math import no_such_name"}, "cannot import name 'no_such_name'"),
    ({"setup": "def check(f):\n    import no_module\n    assert f(1, 2) == 3", "tests": ["check(add)"]}, "no_module"),
    ({"setup": "x = {}['key']"}, "KeyError: 'key'"),
    ({"setup": "x = int('one')"}, "ValueError: invalid literal"),
    ({"preamble": "import no_such_module"}, "No module named 'no_such_module'"),
    ({"tests": ["assert add(1, 2) == 3", "import no_such_module\nassert add(1, 2) == 3"]}, "test 2 fails without"),
    ({"tests": ["raise SystemExit(0)"]}, "SystemExit"),
    ({"tests": ["@__import__('pytest').mark.skip\ndef test_a(): add(1, 2)"]}, "Skipped"),
    ({"tests": ["import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.nothing\n"
                "    def test_a(self): add(1, 2)"]}, "no attribute 'nothing'"),
    ({"code": "import pytest\n@pytest.fixture\ndef a(): return 1\ndef test_a(a): add(a, 2)"}, "pytest.fixture is not"),
    ({"code": "from pytest import fixture\ndef test_a(): add(1, 2)"}, "cannot import name 'fixture'"),
    ({"code": "def test_a(tmp_path): add(1, 2)"}, "missing 1 required positional argument: 'tmp_path'"),
    ({"code": "import pytest\n@pytest.mark.xfail\ndef test_a(): add(1, 2)"}, "pytest.mark.xfail is not"),
    ({"code": "import pytest\n@pytest.mark.usefixtures('a')\ndef test_a(): add(1, 2)"}, "usefixtures is not"),
    ({"code": "import pytest\n@pytest.mark.skipif(True, reason='old')\ndef test_a(): add(1, 2)"}, "skipped: old"),
    ({"code": "import pytest\n@pytest.mark.parametrize('b', [1])\ndef test_a(a): add(1, 2)"}, "unexpected keyword"),
    ({"code": "import pytest\npytestmark = pytest.mark.skip\ndef test_a(): add(1, 2)"}, "pytestmark"),
    ({"code": "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('')\n    def test_a(self): add(1, 2)"},
     "or all are skipped"),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "why"), BROKEN)
def test_tests_that_no_answer_can_pass_are_ungraded_for_all(pool: CodeGraderPool, problem: dict, why: str) -> None:
    kind = "pytest" if "code" in problem else "assert"
    reference = json.dumps({"tests": ["assert add(1, 2) == 3"], **problem, "kind": kind} if kind == "assert" else
                           {**problem, "kind": kind})  # fmt: skip
    answers = {"right": ADD, "wrong": WRONG, "no Python": "def", "ends": "import os\nos._exit(0)", "other": "x = 1"}
    grades = pool.grade_many([(name, f"```python\n{text}\n```", reference) for name, text in answers.items()])
    assert {grade.outcome for grade in grades} == {"ungraded"}, grades
    assert all(why in grade.reason for grade in grades), grades[0].reason


# An answer would rather be ungraded than wrong: what it does to the tests is its own failing.
ESCAPES = {
    "no such name": "x = 1",
    "import error": "def add(a, b): import no_such_module",
    "fails to load": "import no_such_module",
    "skips": "import unittest\ndef add(a, b): raise unittest.SkipTest('please')",
    "a class of that name": "class Skipped(BaseException): pass\ndef add(a, b): raise Skipped('please')",
    "exits": "def add(a, b): raise SystemExit(0)",
    "name error": "def add(a, b): raise NameError('add')",
    "interrupts": "def add(a, b): raise KeyboardInterrupt",
    "fills the folder": "open('big', 'wb').write(b'x' * (16 << 20))\ndef add(a, b): return 0",
    "fills the folder with files": (
        "try:\n    for i in range(2000): open(f'f{i}', 'w').close()\nexcept OSError: pass\ndef add(a, b): return 0"
    ),
    "modules of its own": (
        "for name in ('math', 'unittest', 'statistics'):\n    open(f'{name}.py', 'w').write('raise ImportError')\n"
        "def add(a, b): return 0"
    ),
    "takes all threads": (
        "import threading\ntry:\n    while True: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "except RuntimeError: pass\ndef add(a, b): return 0"
    ),
    "closes the pipes": "import os\nos.closerange(0, 64)\ndef add(a, b): return 0",
    "says that the tests are broken": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'ImportError: broken')\n    except OSError: pass\n"
        "def add(a, b): return 0"
    ),
    "endless": "def add(a, b):\n    while True: pass",
}
ESCAPED = """
import math, statistics, tempfile, threading, unittest
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 100_000)
thread = threading.Thread(target=print)
thread.start()
class TestA(unittest.TestCase):
    def test_a(self):
        self.assertEqual(add(1, 2), math.floor(statistics.mean([3, 3])))
"""


@pytest.mark.parametrize("name", list(ESCAPES))
def test_no_answer_turns_its_failing_into_that_of_the_tests(pool: CodeGraderPool, name: str) -> None:
    assert outcome(pool, ADD, kind="pytest", code=ESCAPED) == "correct"
    assert outcome(pool, ESCAPES[name], kind="pytest", code=ESCAPED, cpu_seconds=1.0) == "wrong"
    plain = ["import math\nassert add(1, 2) == 3"]
    assert outcome(pool, ESCAPES[name], kind="assert", tests=plain, cpu_seconds=1.0) == "wrong"


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


def test_an_answer_does_not_replace_what_the_problem_defines(pool: CodeGraderPool) -> None:
    """As `poly` of HumanEval/32: the prompt has it, tests use it, and the answer could write it anew."""
    problem = {
        "kind": "assert",
        "preamble": "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n",
        "tests": ["import math\nassert math.fabs(poly([1, 2], find_zero([1, 2]))) < 1e-4"],
    }
    assert outcome(pool, "def find_zero(xs): return -xs[0] / xs[1]", **problem) == "correct"
    assert outcome(pool, "def find_zero(xs): return 7.0", **problem) == "wrong"
    assert outcome(pool, "def find_zero(xs): return 7.0\ndef poly(xs, x): return 0.0", **problem) == "wrong"
