"""Malformed input files: every problem named with file and line, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.data import read_prompt_rows, read_sft_rows
from megatron_klear.errors import DataError

Writer = Callable[..., Path]


def sft(row_id: Any = "a", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    return {"id": row_id, "messages": messages, **changes}


def prompt(row_id: Any = "a", **changes: Any) -> dict[str, Any]:
    row = {"id": row_id, "domain": "math", "messages": [{"role": "user", "content": "q"}], "reference": "4"}
    return {**row, **changes}


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_good_rows_are_read_in_order_with_their_place(write_jsonl: Writer) -> None:
    first = write_jsonl(sft("a", source="x", more=1), "", sft(7), name="1.jsonl")
    second = write_jsonl(sft("b"), name="2.jsonl")
    rows = read_sft_rows([first, str(second)])
    assert [(r.row_id, r.source, r.where) for r in rows] == [
        ("a", "x", f"{first}:1"),
        ("7", "", f"{first}:3"),
        ("b", "", f"{second}:1"),
    ]
    assert rows[0].messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "r"})


def test_reasoning_may_stand_by_itself_and_unknown_keys_are_passed_over(write_jsonl: Writer) -> None:
    answer = {"role": "assistant", "content": "r", "reasoning_content": "t", "name": "x", "tool_calls": None}
    rows = read_sft_rows([write_jsonl(sft(messages=[*said(("user", "q")), answer]))])
    assert rows[0].messages[1] == {"role": "assistant", "content": "r", "reasoning_content": "t"}


def test_a_byte_order_mark_line_separators_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    text = json.dumps(sft(messages=said(("user", "a\u2028b"), ("assistant", "r"))), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_sft_rows([path])[0].messages[0]["content"] == "a\u2028b"


def test_prompt_rows(write_jsonl: Writer) -> None:
    tests = [{"input": "1", "output": "2"}]
    rows = read_prompt_rows(
        [write_jsonl(prompt(), prompt("b", reference=204), prompt("c", domain="code", reference=tests))]
    )
    assert [(r.row_id, r.domain, r.reference) for r in rows[:2]] == [("a", "math", "4"), ("b", "math", "204")]
    assert json.loads(rows[2].reference) == tests


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "a",', "is not JSON"),
        ("[1, 2]", "must be a JSON object, got a list"),
        ("null", "must be a JSON object, got null"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "a number has too many digits"),
        (
            sft(messages=said(("system", "s"), ("assistant", "r"))),
            "the first message must be of role user (or system), got assistant",
        ),
        (
            {"messages": said(("user", "q"), ("assistant", "r"))},
            "id must be a non-empty string or a whole number, got none",
        ),
        (sft(""), "id must be"),
        (sft(True), "id must be a non-empty string or a whole number, got a boolean"),
        (sft(1.5), "id must be a non-empty string or a whole number, got a number"),
        ({"id": "a"}, "messages must be a non-empty list, got none"),
        (sft(messages=[]), "got an empty list"),
        (sft(messages="hello"), "got a string"),
        (sft(messages=["hello"]), "message 1 must be an object, got a string"),
        (sft(messages=said(("user", "q"))), "the last message must be of role assistant, got user"),
        (
            sft(messages=said(("human", "q"), ("assistant", "r"))),
            'role must be one of system, user, assistant, got "human"',
        ),
        (
            sft(messages=said(("user", "q"), ("system", "s"), ("assistant", "r"))),
            "message 2: a system message must come first",
        ),
        (sft(messages=said(("user", None), ("assistant", "r"))), "message 1: content must be a string, got null"),
        (sft(messages=said(("user", "q"), ("assistant", " \n"))), "message 2: content is empty"),
        (sft(messages=said(("user", "\ud800"), ("assistant", "r"))), "message 1: holds half of a surrogate pair"),
        (
            sft(messages=[{"role": "user", "content": "q", "reasoning_content": "t"}, *said(("assistant", "r"))]),
            "message 1: reasoning_content",
        ),
        (sft(source=3), "source must be a string, got a number"),
    ],
)
def test_each_fault_of_an_sft_row_is_named_with_its_line(write_jsonl: Writer, line: object, expected: str) -> None:
    path = write_jsonl(sft("good"), line)
    with pytest.raises(DataError) as caught:
        read_sft_rows([path])
    assert f"{path}:2: " in str(caught.value)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("1 problem with the files of data.sft:")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (prompt(domain="physics"), 'domain must be one of math, code, got "physics"'),
        (prompt(domain=["math"]), "domain must be one of math, code"),
        (
            prompt(messages=said(("user", "q"), ("assistant", "r"))),
            "the last message must be of role user, got assistant",
        ),
        (prompt(reference=""), "got an empty string"),
        (prompt(reference=None), "got null"),
        (prompt(reference=True), "got a boolean"),
        (prompt(domain="code", reference="print(1)"), "got a string that is not JSON"),
        (prompt(domain="code", reference=3), "must hold its tests as JSON, got a number"),
        (prompt(domain="code", reference=[]), "must hold its tests as JSON, got a list"),
    ],
)
def test_each_fault_of_a_prompt_row_is_named(write_jsonl: Writer, row: object, expected: str) -> None:
    path = write_jsonl(row)
    with pytest.raises(DataError) as caught:
        read_prompt_rows([path], setting="data.heldout")
    assert f"{path}:1: " in str(caught.value)
    assert expected in str(caught.value)
    assert "data.heldout" in str(caught.value)


def test_all_problems_of_all_files_are_told_at_once(write_jsonl: Writer, tmp_path: Path) -> None:
    first = write_jsonl("{", sft("a"), sft("", source=1), name="1.jsonl")
    second = write_jsonl(sft("a"), name="2.jsonl")
    missing = tmp_path / "none.jsonl"
    with pytest.raises(DataError) as caught:
        read_sft_rows([first, missing, second, tmp_path])
    text = str(caught.value)
    assert text.startswith("6 problems with the files of data.sft:")
    assert f"{first}:1: is not JSON" in text
    assert f"{first}:3: id must be" in text
    assert f"{first}:3: source must be" in text
    assert f"{missing}: cannot be read (No such file or directory); it is listed in data.sft" in text
    assert f"{second}:1: has the id 'a' of {first}:2; ids must be unique" in text
    assert f"{tmp_path}: cannot be read (Is a directory)" in text


def test_of_very_many_problems_the_first_are_told_and_the_rest_counted(write_jsonl: Writer) -> None:
    path = write_jsonl(*["{"] * 1000)
    with pytest.raises(DataError) as caught:
        read_sft_rows([path])
    text = str(caught.value)
    assert text.startswith("1000 problems")
    assert f"{path}:20: " in text
    assert f"{path}:21: " not in text
    assert "... and 980 more" in text


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(sft()).encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: is not UTF-8 \(byte 12 of the line\)"):
        read_sft_rows([path])


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_data_set_is_refused(write_jsonl: Writer, lines: list[str]) -> None:
    path = write_jsonl(*lines)
    with pytest.raises(DataError) as caught:
        read_prompt_rows([path])
    assert f"{path}: no rows at all; list a file with rows in data.prompts" in str(caught.value)


def test_no_files_at_all_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.sft: lists no files"):
        read_sft_rows([])
