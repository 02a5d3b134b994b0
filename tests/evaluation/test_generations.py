"""Generations files: every form that is allowed, rows that cannot be used, and what they are matched with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.data.rows import PromptRow
from megatron_klear.evaluation import Benchmark, Generation, Rejects, matched, read_generations, write_generations


def read(tmp_path: Path, *rows: Any) -> tuple[list[Generation], list[str]]:
    file = tmp_path / "generations.jsonl"
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    rejects = Rejects("the generations", tmp_path / "rejects.jsonl")
    found = list(read_generations(file, rejects))
    told = rejects.path.read_text().splitlines() if rejects.path.exists() else []
    assert len(told) == len(rejects)
    return found, [json.loads(line)["where"] + ": " + json.loads(line)["reason"] for line in told]


def test_responses_may_stand_in_one_row_or_in_several(tmp_path: Path) -> None:
    found, rejected = read(
        tmp_path,
        {"problem_id": "a", "responses": ["x", "y"]},
        {"problem_id": "a", "response": "z"},
        {"problem_id": 1, "index": 5, "response": "", "finish_reason": "length", "num_tokens": 9, "benchmark": "b"},
    )
    assert rejected == []
    assert found == [
        Generation(problem_id="a", index=0, response="x"),
        Generation(problem_id="a", index=1, response="y"),
        Generation(problem_id="a", index=2, response="z"),
        Generation(
            problem_id="1", index=5, response="", finish_reason="length", num_tokens=9, benchmark="b",
        ),
    ]  # fmt: skip


def test_responses_without_an_index_get_those_that_no_earlier_row_has(tmp_path: Path) -> None:
    found, rejected = read(
        tmp_path,
        {"problem_id": "a", "index": 1, "response": "one"},
        {"problem_id": "a", "response": "zero"},
        {"problem_id": "a", "index": 4, "responses": ["four", "five"]},
        {"problem_id": "a", "responses": ["two", "three", "six"]},
        {"problem_id": "b", "response": "zero"},
        {"problem_id": "a", "index": 6, "response": "again"},
    )
    names = ["zero", "one", "two", "three", "four", "five", "six"]
    assert [(made.problem_id, made.index) for made in found] == [
        *(("a", names.index(name)) for name in ("one", "zero", "four", "five", "two", "three", "six")), ("b", 0),
    ]  # fmt: skip
    assert all(made.response == names[made.index] for made in found)
    assert [told.split(": ", 1)[1] for told in rejected] == ["response 6 to problem 'a' was given before"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = [
        Generation(problem_id="a", index=i, response="\u2028é\n", finish_reason="abort", num_tokens=i, benchmark="b")
        for i in range(3)
    ]
    write_generations(tmp_path / "written.jsonl", made)
    assert list(read_generations(tmp_path / "written.jsonl", Rejects("x", tmp_path / "rejects.jsonl"))) == made


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"response": "x"}, "problem_id must be a text or a whole number, got none"),
        ({"problem_id": True, "response": "x"}, "problem_id must be a text or a whole number, got true"),
        ({"problem_id": "a"}, "expected one of response and responses"),
        ({"problem_id": "a", "response": "x", "responses": ["x"]}, "expected one of response and responses"),
        ({"problem_id": "a", "response": None}, "response must be a text, got null"),
        ({"problem_id": "a", "responses": []}, "responses must be a list of at least one text"),
        ({"problem_id": "a", "responses": ["x", 1]}, "responses must be a list of at least one text"),
        ({"problem_id": "a", "response": "x", "index": -1}, "index must be a whole number from 0 to 2^53, got -1"),
        ({"problem_id": "a", "response": "x", "finish_reason": "eos"}, "finish_reason must be one of stop, length"),
        (
            {"problem_id": "a", "response": "x", "index": 10**400},
            "index must be a whole number from 0 to 2^53, got 1000",
        ),
        ({"problem_id": "a", "response": "x", "num_tokens": 1.5}, "num_tokens must be a whole number from 0 to 2^53"),
        ({"problem_id": "a", "response": "x", "num_tokens": 10**400}, "num_tokens must be a whole number from 0 to"),
        ({"problem_id": "a", "response": "x", "benchmark": 3}, "benchmark must be a text, got 3"),
        ({"problem_id": "a", "index": 0, "response": "again"}, "response 0 to problem 'a' was given before"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1]", "must be a JSON object, got a list"),
        (b'{"problem_id": "a", "response": "cut', "is not JSON"),
    ],
)
def test_rows_that_cannot_be_used_are_rejected_by_line_and_the_others_used(tmp_path: Path, row: Any, says: str) -> None:
    found, rejected = read(tmp_path, {"problem_id": "a", "response": "x"}, row, {"problem_id": "b", "response": "y"})
    assert [made.problem_id for made in found] == ["a", "b"]
    (told,) = rejected
    assert told.startswith(f"{tmp_path}/generations.jsonl:2: ")
    assert says in told


def test_a_file_that_is_not_there_is_a_reject(tmp_path: Path) -> None:
    rejects = Rejects("the generations", tmp_path / "rejects.jsonl")
    assert list(read_generations(tmp_path / "none.jsonl", rejects)) == []
    assert "No such file" in rejects.path.read_text()


def benchmark(name: str, *ids: str) -> Benchmark:
    rows = [
        PromptRow(row_id=i, domain="math", messages=({"role": "user", "content": "?"},), reference="4", where=i)
        for i in ids
    ]
    return Benchmark(name=name, rows=tuple(rows))


def test_generations_find_their_problem(tmp_path: Path) -> None:
    rejects = Rejects("the generations", tmp_path / "rejects.jsonl")
    made = [
        Generation(problem_id="only in b", index=0, response=""),
        Generation(problem_id="both", index=0, response="", benchmark="b"),
        Generation(problem_id="both", index=0, response=""),
        Generation(problem_id="nowhere", index=0, response=""),
        Generation(problem_id="only in b", index=1, response="", benchmark="a"),
    ]
    found = matched(made, [benchmark("a", "both"), benchmark("b", "both", "only in b")], rejects)
    assert found == {"a": [], "b": made[:2]}
    reasons = [json.loads(line)["reason"] for line in rejects.path.read_text().splitlines()]
    assert "several benchmarks have this problem (a, b)" in reasons[0]
    assert "has no problem 'nowhere'" in reasons[1]
    assert "benchmark 'a' has no problem 'only in b'" in reasons[2]
