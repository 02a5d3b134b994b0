"""Benchmark rows in every published form, and rows that are none."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_klear.config.evaluating import repeated_names
from megatron_klear.errors import DataError
from megatron_klear.evaluation import Contests, read_benchmark

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
        # Fields as the data sets' cards list them: Maxwell-Jia/AIME_2024, di-zhang-fdu/AIME_1983_2024,
        # HuggingFaceH4/aime_2024, opencompass/AIME2025, math-ai/aime25, MathArena/hmmt_feb_2025 and aime_2025.
        ({"ID": "2024-I-1", "Problem": "What is 2 + 2?", "Solution": "It " * 99, "Answer": 4}, "2024-I-1", "4"),
        ({"ID": "1983-1", "Year": 1983, "Question": "What is 2 + 2?", "Answer": "4", "Part": None}, "1983-1", "4"),
        (
            {"id": 60, "problem": "What is 2 + 2?", "solution": "It " * 99, "answer": "4", "url": "u", "year": "2024"},
            "60",
            "4",
        ),
        ({"question": "What is 2 + 2?", "answer": "4"}, "bench:1", "4"),
        ({"problem": "What is 2 + 2?", "answer": "4", "id": "0"}, "0", "4"),
        ({"problem_idx": 1, "problem": "What is 2 + 2?", "answer": "4", "problem_type": ["Algebra"]}, "1", "4"),
        ({"id": None, "problem_idx": 1, "problem": "What is 2 + 2?", "answer": 4.0, "meta": {"id": None}}, "1", "4"),
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
        ({"k" * 99_999: 1}, r"is no benchmark row: .* got the keys k+ \.\.\."),
        ({"problem": "  ", "answer": "4"}, "is no benchmark row"),
        ({"messages": "hi", "answer": "4"}, "messages must be a non-empty list"),
        ("{", "bench.jsonl:2: is not JSON"),
        ('{"a": 1}\udc80'.encode("utf-8", "surrogateescape").decode("latin-1"), "bench.jsonl:2"),
    ],
)
def test_rows_without_an_answer_are_named(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        rows_of(tmp_path, {"id": 1, "messages": USER, "answer": "4"}, row)


def test_parquet_files_are_read_as_the_hub_has_them(tmp_path: Path) -> None:
    """Types as the cards of MathArena/hmmt_feb_2025 and of Maxwell-Jia/AIME_2024 declare them."""
    hmmt = pa.table(
        {
            "problem_idx": pa.array([1, 2], pa.int64()),
            "problem": ["What is 2 + 2?", "What is 1/2 + 1/2?"],
            "answer": ["4", "1"],
            "problem_type": pa.array([["Algebra"], []], pa.list_(pa.string())),
        }
    )
    pq.write_table(hmmt, tmp_path / "hmmt.parquet", row_group_size=1)
    rows = read_benchmark(tmp_path / "hmmt.parquet", setting="benchmarks.files")
    assert [(r.row_id, r.reference, r.where.rpartition("/")[2]) for r in rows] == [
        ("1", "4", "hmmt.parquet:1"), ("2", "1", "hmmt.parquet:2"),
    ]  # fmt: skip
    aime = pa.table({"ID": ["2024-I-1"], "Problem": ["What is 2 + 2?"], "Solution": ["Add."], "Answer": [4]})
    pq.write_table(aime, tmp_path / "aime.parquet")
    (row,) = read_benchmark(tmp_path / "aime.parquet", setting="benchmarks.files")
    assert (row.row_id, row.reference) == ("2024-I-1", "4")
    livecode = [livecodebench(contest_date=datetime(2025, 1, day)) for day in (4, 5)]
    pq.write_table(pa.Table.from_pylist([{**r, "question_id": str(i)} for i, r in enumerate(livecode)]),
                   tmp_path / "lcb.parquet")  # fmt: skip
    some = Contests(last=date(2025, 1, 4))
    (row,) = read_benchmark(tmp_path / "lcb.parquet", setting="benchmarks.files", contests=some)
    assert row.row_id == "0"
    (tmp_path / "not.parquet").write_bytes(b"PAR1 of nothing")
    with pytest.raises(DataError, match=r"not.parquet: is not a Parquet file"):
        read_benchmark(tmp_path / "not.parquet", setting="benchmarks.files")


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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("length", [2, 300, 100_000])
def test_private_tests_pickled_by_any_protocol_are_read(tmp_path: Path, protocol: int, length: int) -> None:
    tests = [{"input": "\u00e9\n" * length, "output": "2\n", "testtype": "stdin"}]
    text = json.dumps(tests, ensure_ascii=False)
    pickled = base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()
    (found,) = rows_of(tmp_path, livecodebench(private_test_cases=pickled))
    assert json.loads(found.reference)["tests"][1]["input"] == tests[0]["input"]


def test_contests_are_chosen_by_day(tmp_path: Path) -> None:
    days = ["2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-01-04T19:30:00", "2025-02-01T00:00:00", "2025-02-02"]
    rows = [livecodebench(question_id=day, contest_date=day) for day in days]
    rows[0]["private_test_cases"] = "%%%"  # nothing is unpacked of what is not asked
    file = tmp_path / "lcb.jsonl"
    math = {"id": 1, "problem": "What is 2 + 2?", "answer": "4"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, math]))

    def ids(first: date | None, last: date | None) -> list[str]:
        contests = Contests(first=first, last=last)
        return [row.row_id for row in read_benchmark(file, setting="benchmarks.files", contests=contests)]

    assert ids(date(2024, 8, 1), date(2025, 2, 1)) == [*days[1:4], "1"]  # the paper's V5
    assert ids(date(2024, 8, 1), None) == [*days[1:], "1"]
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="none of its 1 problems is of a contest of the days"):
        ids(date(2025, 2, 1), None)
    for wrong in ("tomorrow", 20250101, None):
        file.write_text(json.dumps({**rows[1], "contest_date": wrong}))
        with pytest.raises(DataError, match="contest_date must be a date such as"):
            ids(date(2024, 8, 1), None)


def test_tests_that_unpack_to_more_than_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_klear.evaluation.livecodebench._LARGEST_BYTES", 1 << 20)
    tests = json.dumps([{"input": "0" * (1 << 20), "output": "", "testtype": "stdin"}])
    for text in (tests, tests[: (1 << 20) - 2]):  # above the limit, and above it by what a pickle adds
        with pytest.raises(DataError, match="private_test_cases unpacks to more than 1048576 bytes"):
            rows_of(tmp_path, livecodebench(private_test_cases=packed(text)))
    whole = base64.b64decode(packed(tests[:1000]))
    with pytest.raises(DataError, match="or is cut off"):
        rows_of(tmp_path, livecodebench(private_test_cases=base64.b64encode(whole[:-3]).decode()))


# They make the unpickler raise TypeError, AttributeError, IndexError, KeyError and what else it does.
DAMAGED_PICKLES = [b"K\x01K\x02K\x03s.", b"K\x01K\x02a.", b"(K\x01R.", b"}]K\x01s.", b"s.", b"h\x05.", b"\x80\xff."]


def damaged(pickled: bytes) -> str:
    return base64.b64encode(zlib.compress(pickled)).decode()


class Runs:
    """What unpickles by running something."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/klear-unpickled",)


FUNCTIONAL = [{"input": "1", "output": "2", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({"private_test_cases": damaged(pickled)}, "neither JSON nor packed JSON") for pickled in DAMAGED_PICKLES),
        (
            {"private_test_cases": packed(Runs())},
            "the pickle may hold one text and nothing else, found SHORT_BINUNICODE",
        ),
        ({"private_test_cases": packed([1])}, "the pickle may hold one text and nothing else, found EMPTY_LIST"),
        ({"private_test_cases": packed(None)}, "the pickle may hold one text and nothing else, found NONE"),
        ({"private_test_cases": damaged(b"\x80\x04.")}, "the pickle holds no text"),
        # Memo entry 2,147,483,647: an unpickler takes 32 GiB for its table, whatever classes it refuses.
        ({"private_test_cases": damaged(b"\x80\x04]r\xff\xff\xff\x7f.")}, "nothing else, found EMPTY_LIST"),
        ({"private_test_cases": damaged(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fx.")}, "neither JSON nor packed JSON"),
        ({"private_test_cases": None}, "private_test_cases must be a list of tests as JSON"),
        ({"private_test_cases": "[" * 100_000}, "private_test_cases is not JSON"),
        ({"public_test_cases": "[" + "9" * 5000 + "]"}, "public_test_cases is not JSON"),
        ({"question_content": None}, "question_content must be a text, got null"),
        ({"question_content": [1]}, "question_content must be a text, got a list"),
        ({"question_content": " "}, "question_content must be a text, got an empty text"),
        ({"question_content": "a\0b"}, "holds a NUL character"),
        ({"starter_code": {"a": 1}}, "starter_code must be a text, got an object"),
        ({"question_id": None}, "id must be a non-empty string"),
        ({"question_id": "\ud800"}, "id holds a NUL character or half of a surrogate pair"),
        (
            {
                "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "functional"}]),
                "private_test_cases": "[]",
                "metadata": '{"func_name": "f"}',
                "starter_code": " ",
            },
            "starter_code is empty, and without it nobody knows",
        ),
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
