"""Reading programs out of responses, comparing outputs, and the declared schema of tests."""

from __future__ import annotations

import json
import time

import pytest

from megatron_klear.reward.code_answers import last_code_block
from megatron_klear.reward.code_compare import different_text, different_value
from megatron_klear.reward.code_tests import json_schema, parse_problem


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


def test_the_schema_is_declared() -> None:
    schema = json_schema()
    kinds = {name: set(part["properties"]) for name, part in schema["$defs"].items() if "kind" in part["properties"]}
    common = {"kind", "preamble", "solution", "cpu_seconds"}
    assert kinds == {
        "StdinProblem": common | {"tests", "tolerance"},
        "CallProblem": common | {"tests", "tolerance", "function"},
        "AssertProblem": common | {"tests", "setup"},
        "PytestProblem": common | {"code"},
    }


def test_what_is_expected_never_travels() -> None:
    """Not in the messages of programs and calls; a test's process alone is told an assertion (inside/checks)."""
    stdin = {"kind": "stdin", "tests": [{"input": "1", "output": "SECRET"}]}
    call = {"kind": "call", "function": "f", "tests": [{"args": [1], "output": "SECRET"}]}
    for reference in (stdin, call):
        problem = parse_problem(json.dumps({**reference, "solution": "SECRET"}))
        assert "SECRET" not in json.dumps([problem.messages(), problem.sources("x")])


def test_tests_of_a_file_are_its_functions_and_methods() -> None:
    methods = "    def setup_method(self): pass\n    def test_c(self): pass\n"
    code = f"def helper(): pass\ndef test_a(): pass\nclass TestB:\n{methods}"
    problem = parse_problem(json.dumps({"kind": "pytest", "code": code}))
    assert [m["test"] for m in problem.messages()] == [
        "test_a()",
        "_test = TestB(); _test.setup_method(); _test.test_c()",
    ]
    assert {m["setup"] for m in problem.messages()} == {code}
