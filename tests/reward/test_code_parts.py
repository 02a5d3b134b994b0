"""Reading programs out of responses, comparing outputs, and the declared schema of tests."""

from __future__ import annotations

import json
import time

import pytest

from megatron_klear.reward.code_answers import last_code_block
from megatron_klear.reward.code_compare import different_text, different_value
from megatron_klear.reward.code_tests import BadTestsError, json_schema, parse_problem


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```py\na\n```\ntext\n```Python 3\nb\n```\nmore", "b\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
        ("   ```python\nx\n   ```", "x\n"),
        ("```python\r\nx\r\n```\r\n", "x\r\n"),
        ("```python\n'''\n```\n", "'''\n"),
    ],
)
def test_the_last_block_is_the_program(text: str, code: str) -> None:
    assert last_code_block(text) == (code, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "no fenced code block"),
        ("`x`", "no fenced code block"),
        ("```python\na\n```\n```python\nb", "not closed"),
        ("```python\na\n~~~", "not closed"),
        ("```python\n \n```", "empty"),
        ("```cpp\nint x;\n```", "'cpp', not Python"),
    ],
)
def test_texts_without_a_program_say_why(text: str, why: str) -> None:
    code, problem = last_code_block(text)
    assert code is None
    assert why in problem


@pytest.mark.parametrize("unit", ["```\n", "```python\nx\n```\n", "`" * 100, "~~~ "])
def test_megabytes_of_fences_are_read_in_linear_time(unit: str) -> None:
    start = time.perf_counter()
    last_code_block(unit * (3_000_000 // len(unit)))
    assert time.perf_counter() - start < 20.0


@pytest.mark.parametrize(
    ("expected", "output", "tolerance", "equal"),
    [
        ("3\n", "3", 0.0, True),
        ("3", " 3 \n\n", 0.0, True),
        ("a\nb", "a  \r\nb\r\n", 0.0, True),
        ("a\n\nb", "a\nb", 0.0, False),
        ("a b", "a  b", 0.0, True),
        ("1.50", "1.5", 0.0, True),
        ("1e3", "1000", 0.0, True),
        ("1.5", "1.5000001", 0.0, False),
        ("1.5", "1.5000001", 1e-6, True),
        ("1.5", "1.6", 1e-6, False),
        ("1000000", "1000000.5", 1e-6, True),
        ("1", "nan", 1.0, False),
        ("1", "inf", 1.0, False),
        ("12345678901234567890", "12345678901234567891", 0.0, False),
        ("Yes", "YES", 0.0, False),
        ("", "\n", 0.0, True),
        ("", "x", 0.0, False),
        ("x", "", 0.0, False),
        ("1", "1e9999", 1.0, False),
        ("1", "9" * 5000, 1.0, False),
        ("1", "1.0", 0.0, True),
        ("0.50", ".5", 0.0, True),
        ("0011", "0011", 0.0, True),
        ("0011", "11", 0.0, False),
        ("7", "07", 0.0, False),
        ("3", "\uff13", 0.0, False),
        ("1e400", "1", 1.0, False),
    ],
)
def test_printed_text(expected: str, output: str, tolerance: float, equal: bool) -> None:
    assert (different_text(expected, output.encode(), tolerance) == "") == equal


@pytest.mark.parametrize("output", [b"\xff\xfe", b"\x00", b"", b"3\x00"])
def test_bytes_that_are_no_text_are_equal_to_nothing(output: bytes) -> None:
    assert different_text("3", output, 0.0).isprintable()
    assert different_text("3", output, 0.0)


@pytest.mark.parametrize(
    "output", [b"", b"[", b"\xff", b"[" * 100_000, b"9" * 10_000, b'"x"', b"NaN", b"Infinity", b"true", b"null", b"[3]"]
)
def test_hostile_results_are_no_answer(output: bytes) -> None:
    assert different_value(3, output, 1e-6)


@pytest.mark.parametrize(
    ("expected", "result", "equal"),
    [
        ("Infinity", "Infinity", True), ("Infinity", "-Infinity", False), ("Infinity", "0.5", False),
        ("1e999", "1e308", False), ("[Infinity]", "[3]", False), ("NaN", "NaN", True), ("NaN", "0", False),
        ("NaN", "Infinity", False), ("0.5", "NaN", False), ("1e-7", "0", False), ("1e-7", "1.0000001e-7", True),
        ("0.0", "1e-17", True), ("1e9", "1000000000.5", True), ("1.5", "1.50001", False), ("2.0", "2", True),
    ],
)  # fmt: skip
def test_results_of_calls(expected: str, result: str, equal: bool) -> None:
    reference = f'{{"kind": "call", "function": "f", "tests": [{{"args": [], "output": {expected}}}]}}'
    assert (parse_problem(reference).judge(0, result.encode()) == "") == equal


def test_the_tests_are_told_the_whole_preamble() -> None:
    preamble = "import math\nclass Node: pass\ndef close(a, b):\n    return math.isclose(a, b)\n"
    for rest in (
        {"kind": "assert", "tests": ["assert close(f(), 1)"]},
        {"kind": "pytest", "code": "def test_a(): f()"},
    ):
        (message,) = parse_problem(json.dumps({**rest, "preamble": preamble})).messages()
        assert message["preamble"] == preamble
        with pytest.raises(BadTestsError, match="preamble: is not Python"):
            parse_problem(json.dumps({**rest, "preamble": "def"}))


def test_the_schema_is_declared() -> None:
    schema = json_schema()
    kinds = {name: set(part["properties"]) for name, part in schema["$defs"].items() if "kind" in part["properties"]}
    common = {"kind", "preamble", "solution", "cpu_seconds"}
    assert kinds == {
        "StdinProblem": common | {"tests", "tolerance"},
        "CallProblem": common | {"tests", "tolerance", "function"},
        "AssertProblem": common | {"tests", "setup", "defines"},
        "PytestProblem": common | {"code", "defines"},
    }


def test_what_is_expected_never_travels() -> None:
    """Not in the messages of programs and calls; a test's process alone is told an assertion (inside/checks)."""
    stdin = {"kind": "stdin", "tests": [{"input": "1", "output": "SECRET"}]}
    call = {"kind": "call", "function": "f", "tests": [{"args": [1], "output": "SECRET"}]}
    for reference in (stdin, call):
        problem = parse_problem(json.dumps({**reference, "solution": "SECRET"}))
        assert "SECRET" not in json.dumps([problem.messages(), problem.sources("x")])


FILE = """
import unittest, pytest
from unittest import TestCase, skip
def helper(): pass
def test_a(): f()
@pytest.mark.skip
def test_off(): f()
class Base:
    def test_inherited(self): f()
    def test_replaced(self): f()
class TestB(Base):
    def setup_method(self): pass
    def test_b(self): f()
    def test_replaced(self): f()
    @pytest.mark.skip(reason="slow")
    def test_off(self): f()
    class TestWithin:
        def test_c(self): f()
class Cases(unittest.TestCase):
    def test_d(self): f()
    @unittest.skip("later")
    def test_off(self): f()
class MoreCases(Cases):
    def test_e(self): f()
@skip("all of it")
class TestOff(TestCase):
    def test_off(self): f()
class TestNot:
    __test__ = False
    def test_off(self): f()
"""


def test_tests_of_a_file_are_its_functions_and_methods() -> None:
    messages = parse_problem(json.dumps({"kind": "pytest", "code": FILE})).messages()
    assert [m["case"] for m in messages] == [
        "test_a", "TestB.test_inherited", "TestB.test_replaced", "TestB.test_b", "TestB.TestWithin.test_c",
        "Cases.test_d", "MoreCases.test_d", "MoreCases.test_e",
    ]  # fmt: skip
    assert {m["test"] for m in messages} == {FILE}
