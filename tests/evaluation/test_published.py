"""Benchmark rows in every published form, and rows that are none."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.evaluating import repeated_names
from megatron_klear.errors import DataError
from megatron_klear.evaluation import read_benchmark

USER = [{"role": "user", "content": "What is 2 + 2?"}]


def rows_of(tmp_path: Path, *rows: Any, name: str = "bench.jsonl") -> list[Any]:
    file = tmp_path / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_benchmark(file, setting="benchmarks.files")


@pytest.mark.parametrize(
    ("row", "row_id", "reference"),
    [
        ({"id": "p", "domain": "math", "messages": USER, "reference": "4"}, "p", "4"),
        ({"messages": USER, "meta": {"problem": "What is 2 + 2?", "solution": "4"}}, "bench:1", "4"),
        ({"messages": USER, "meta": {"problem": "?", "solution": "Long. " * 99, "answer": "4"}}, "bench:1", "4"),
        ({"id": 7, "messages": USER, "solution": "\\boxed{4}"}, "7", "\\boxed{4}"),
        ({"id": 7, "messages": USER, "solution": "\\boxed{4}", "answer": "4"}, "7", "4"),
        ({"problem_idx": 3, "problem": "What is 2 + 2?", "answer": 4}, "3", "4"),
        ({"question": "What is 2 + 2?", "solution": "It " * 99 + "is \\boxed{4}"}, "bench:1", None),
    ],
)
def test_every_nesting_of_a_math_answer_is_found(tmp_path: Path, row: Any, row_id: str, reference: str | None) -> None:
    (found,) = rows_of(tmp_path, row)
    assert (found.row_id, found.domain) == (row_id, "math")
    assert found.reference == (reference if reference is not None else row["solution"])
    assert "What is 2 + 2?" in found.messages[-1]["content"]


def test_a_problem_without_messages_is_told_how_to_answer(tmp_path: Path) -> None:
    (found,) = rows_of(tmp_path, {"problem": "What is 2 + 2?", "answer": "4"})
    assert found.messages[0]["content"].startswith("What is 2 + 2?\n\n")
    assert "\\boxed{}" in found.messages[0]["content"]


def test_a_solution_in_the_messages_is_not_shown_to_the_model(tmp_path: Path) -> None:
    answered = [*USER, {"role": "assistant", "content": "\\boxed{4}"}]
    (found,) = rows_of(tmp_path, {"messages": answered, "meta": {"solution": "4"}})
    assert list(found.messages) == USER


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": USER, "meta": {"problem": "?", "solution": "By the theorem. " * 20}}, "has no answer"),
        ({"messages": USER, "answer": ""}, "has no answer"),
        ({"messages": USER, "answer": 0.5}, "has no answer"),
        ({"text": "x"}, "is no benchmark row: .* got the keys text"),
        ({"problem": "  ", "answer": "4"}, "is no benchmark row"),
        ({"messages": "hi", "answer": "4"}, "messages must be a non-empty list"),
        ("{", "bench.jsonl:2: is not JSON"),
        ('{"a": 1}\udc80'.encode("utf-8", "surrogateescape").decode("latin-1"), "bench.jsonl:2"),
    ],
)
def test_rows_without_an_answer_are_named(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        rows_of(tmp_path, {"id": 1, "messages": USER, "answer": "4"}, row)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    row = {"id": 1, "messages": USER, "answer": "4"}
    with pytest.raises(DataError, match=r"bench.jsonl:2: has the id '1' of .*bench.jsonl:1"):
        rows_of(tmp_path, row, row)


def test_files_of_one_name_are_refused() -> None:
    assert repeated_names(["a/aime.jsonl", "b/hmmt.jsonl"], "benchmarks.files") == []
    (problem,) = repeated_names(["a/aime.jsonl", "b/aime.jsonl"], "benchmarks.files")
    assert "a/aime.jsonl and b/aime.jsonl would both be called 'aime'" in problem


def packed(content: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def livecodebench(**changes: Any) -> dict[str, Any]:
    stdin = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    row = {
        "question_title": "t", "question_content": "Add one.", "platform": "atcoder", "question_id": "abc1_a",
        "contest_id": "abc1", "contest_date": "2025-01-01T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": json.dumps(stdin), "private_test_cases": packed(json.dumps(stdin)), "metadata": "{}",
    }  # fmt: skip
    return {**row, **changes}


def test_livecodebench_programs_have_public_and_packed_private_tests(tmp_path: Path) -> None:
    (found,) = rows_of(tmp_path, livecodebench())
    assert (found.row_id, found.domain) == ("abc1_a", "code")
    assert "standard input" in found.messages[0]["content"]
    tests = json.loads(found.reference)
    assert "from typing import *" in tests.pop("preamble")
    assert tests == {"kind": "stdin", "tests": [{"input": "1\n", "output": "2\n"}] * 2}


def test_livecodebench_calls_have_a_function_and_json_arguments(tmp_path: Path) -> None:
    tests = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]
    starter = "class Solution:\n    def has(self, xs, y):\n        "
    (found,) = rows_of(
        tmp_path,
        livecodebench(
            public_test_cases=json.dumps(tests), private_test_cases=json.dumps(tests),
            metadata=json.dumps({"func_name": "has"}), starter_code=starter,
        ),
    )  # fmt: skip
    assert "def has(self, xs, y):" in found.messages[0]["content"]
    reference = json.loads(found.reference)
    assert "from typing import *" in reference.pop("preamble")  # starter code names List without importing it
    assert reference == {
        "kind": "call", "function": "has", "tests": [{"args": [[1, 2], "a"], "output": True}] * 2,
    }  # fmt: skip


class Runs:
    """What unpickles by running something."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/klear-unpickled",)


FUNCTIONAL = [{"input": "1", "output": "2", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"private_test_cases": packed(Runs())}, r"the pickle wants \w+.system, and may hold text only"),
        ({"private_test_cases": packed([1])}, "must hold text, got list"),
        ({"private_test_cases": "%%%"}, "private_test_cases is neither JSON nor packed JSON"),
        ({"private_test_cases": packed("not json")}, "private_test_cases is not JSON"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "has no tests"),
        ({"public_test_cases": json.dumps([{"input": 1}])}, "public_test_cases, test 1: expected input, output"),
        ({"public_test_cases": json.dumps(FUNCTIONAL)}, "mixes tests of the kinds functional, stdin"),
        (
            {"public_test_cases": json.dumps(FUNCTIONAL), "private_test_cases": "[]"},
            "metadata must name the function that its tests call",
        ),
        ({"metadata": "{"}, "metadata is not JSON"),
        (
            {"public_test_cases": json.dumps([{**FUNCTIONAL[0], "input": "one"}]), "private_test_cases": "[]"},
            "arguments and result must be JSON values",
        ),
    ],
)
def test_livecodebench_rows_that_cannot_be_used_are_named(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        rows_of(tmp_path, livecodebench(**changes))
    assert not Path("/tmp/klear-unpickled").exists()
