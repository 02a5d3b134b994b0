"""Whatever is in a file, every line ends as a row or as a reject with file, line and reason."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curation_inputs import row
from megatron_klear.curation.reading import Reject, plan_input, read_rows
from megatron_klear.errors import DataError

RunCuration = Callable[..., Any]

BAD = [
    ('{"id": "a"', "is not JSON"),
    ("[1, 2]", "must be a JSON object, got a list"),
    (json.dumps({**row(1), "id": None}), "id must be"),
    (json.dumps({k: v for k, v in row(2).items() if k != "messages"}), "messages must be a non-empty list, got none"),
    (json.dumps({**row(3), "messages": "text"}), "messages must be a non-empty list, got a string"),
    (json.dumps({**row(4), "domain": "poetry"}), "domain must be one of math, code, got 'poetry'"),
    (json.dumps({**row(5), "reference": {"a": 1}}), "reference of a math row"),
    (json.dumps({**row(6), "pass_rate": 1.5}), "pass_rate must be a number from 0 to 1, got 1.5"),
    (json.dumps({**row(7), "pass_rate": "high"}), "pass_rate must be a number"),
    (json.dumps({**row(8), "embedding": [1.0, "x"]}), "embedding must be a list of finite numbers"),
    (json.dumps({**row(9), "responses": ["fine", 3]}), "response 2 must be a non-empty string"),
    (json.dumps({**row(10), "source": 7}), "source must be a string, got a number"),
    (json.dumps(row(11, "NUL \0 inside")), "NUL"),
    (json.dumps({**row(12), "responses": ["\ud800 half"]}), "half of a surrogate pair"),
    (json.dumps({**row(13), "source": "\ud800 half"}), "source holds half of a surrogate pair"),
    (json.dumps({**row(14), "source": "a\0b"}), "source holds a NUL character"),
    (json.dumps({**row(15), "id": "a\0b"}), "id holds a NUL character or half of a surrogate pair"),
    (json.dumps(row(13, "long " * 300_000)), "is longer than 1048576 bytes"),
    ("[" * 100_000, "not usable JSON: nested too deeply"),
    ('{"id": ' + "9" * 5000 + "}", "a number has too many digits"),
    (json.dumps({**row(14), "messages": [*row(14)["messages"], {"role": "assistant", "content": ""}]}), "response 1"),
]


def test_every_bad_row_is_a_reject_and_the_good_ones_go_on(run_curation: RunCuration, tmp_path: Path) -> None:
    rows: list[object] = []
    for text, _ in BAD:
        rows += [row(100 + len(rows)), text]
    source = tmp_path / "rows.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    data = (
        "".join(line + "\n" for line in lines).encode() + b'{"id": "\xff\xfe broken"}\n\n' + json.dumps(row(1)).encode()
    )
    source.write_bytes(data)
    done = run_curation(None, stages=("dedup",), input={"max_row_bytes": 1 << 20, "max_reject_share": 0.9})
    assert done.ids == [f"r{100 + 2 * i}" for i in range(len(BAD))] + ["r1"]
    found = {reject["line"]: reject for reject in done.rejects}
    assert {reject["file"] for reject in done.rejects} == {str(source)}
    for i, (_, reason) in enumerate(BAD):
        assert reason in found.pop(2 * i + 2)["reason"]
    assert "is not UTF-8" in found.pop(2 * len(BAD) + 1)["reason"]
    assert not found
    assert sum(done.audit("read")["rejected"].values()) == len(BAD) + 1


def test_exploding_and_contradictory_references_are_rejected(run_curation: RunCuration) -> None:
    rows = [row(1), row(2), row(3), row(4)]
    rows[1]["reference"] = "9^{9^{9^{9^{9}}}}!"
    rows[2]["reference"] = "\\frac{" * 3000
    done = run_curation(
        rows, stages=("dedup",), input={"check_references": True, "max_reject_share": 0.9},
        reward={"timeout_seconds": 2.0, "workers": 1},
    )  # fmt: skip
    assert done.ids == ["r1", "r4"]
    assert [r["line"] for r in done.rejects] == [2, 3]
    assert all("the grader finds the reference ungraded as its own answer" in r["reason"] for r in done.rejects)


def test_repeated_ids_are_rejected_across_files(run_curation: RunCuration, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps(row(1, "another text")) + "\n")
    done = run_curation(
        [row(1), row(2)], stages=("dedup",),
        input={"files": [str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl")], "max_reject_share": 0.5},
    )  # fmt: skip
    assert done.ids == ["r1", "r2"]
    assert done.rejects[0]["reason"] == f"has the id 'r1' of {tmp_path / 'rows.jsonl'}:1; ids must be unique"


@pytest.mark.parametrize("part_bytes", [1, 37, 150, 1000, 10**6])
def test_line_numbers_do_not_depend_on_where_a_file_is_cut(tmp_path: Path, part_bytes: int) -> None:
    rng = random.Random(part_bytes)
    file = tmp_path / "a.jsonl"
    texts = []
    for number in range(40):
        kind = rng.randrange(4)
        texts.append(
            "" if kind == 0 else "nonsense" if kind == 1 else json.dumps(row(number, "x" * rng.randrange(1, 90)))
        )
    file.write_text("\n".join(texts) + rng.choice(["", "\n"]))
    found = [item for part in plan_input([str(file)], part_bytes) for item in read_rows(part, 10**6)]
    expected = [(i, "r" if text.startswith("{") else "x") for i, text in enumerate(texts, start=1) if text]
    assert [(item.line, "x" if isinstance(item, Reject) else "r") for item in found] == expected


def test_parquet_rows_are_read_like_lines(run_curation: RunCuration, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(i, source="s", embedding=[0.5, 1.0]) for i in range(7)]
    rows[3]["messages"] = []
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    done = run_curation(
        None, stages=("dedup",), input={"files": [str(tmp_path / "a.parquet")], "max_reject_share": 0.5},
    )  # fmt: skip
    assert done.ids == [f"r{i}" for i in range(7) if i != 3]
    assert [(r["line"], r["reason"]) for r in done.rejects] == [
        (4, "messages must be a non-empty list, got an empty list")
    ]
    (tmp_path / "b.parquet").write_bytes(os.urandom(100))
    with pytest.raises(DataError, match=r"b\.parquet: is not a Parquet file"):
        run_curation(None, stages=("dedup",), input={"files": [str(tmp_path / "b.parquet")]})


def test_too_many_rejects_end_the_run_and_are_listed(run_curation: RunCuration, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 4 rows .* \(2 not JSON\), more than input.max_reject_share = 0.1"):
        run_curation([row(1), "{", "{", row(2)], stages=("dedup",))
    listed = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [2, 3]


def test_a_last_answer_is_a_response(run_curation: RunCuration) -> None:
    answered = row(1)
    answered["messages"] = [*answered["messages"], {"role": "assistant", "content": "2", "reasoning_content": "1+1"}]
    done = run_curation([answered], task="sft", stages=("dedup",))
    assert done.rows[0]["messages"][1:] == [{"role": "assistant", "content": "<think>\n1+1\n</think>\n\n2"}]
