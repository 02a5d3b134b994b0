"""Malformed input files: every problem named with file and line, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.data import SftRow, parse_sft_row, read_prompt_rows
from megatron_klear.data.jsonl import parse_line
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


def parsed(line: object, *, is_first: bool = False) -> SftRow | list[str] | None:
    """A line as an SFT row, or what is wrong with it."""
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    value = parse_line(raw, is_first=is_first)
    return parse_sft_row("f:1", value) if isinstance(value, dict) else [value] if value is not None else None


def test_a_good_row_is_read_and_unknown_keys_are_passed_over() -> None:
    row = parsed(sft(7, source="x", more=1))
    assert isinstance(row, SftRow)
    assert (row.row_id, row.source, row.where) == ("7", "x", "f:1")
    assert row.messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "r"})
    assert parsed("  \n") is None


def test_prompt_files_are_read_in_order_with_their_place(write_jsonl: Writer) -> None:
    first = write_jsonl(prompt("a"), "", prompt(7), name="1.jsonl")
    second = write_jsonl(prompt("b"), name="2.jsonl")
    rows = read_prompt_rows([first, str(second)])
    assert [(r.row_id, r.where) for r in rows] == [("a", f"{first}:1"), ("7", f"{first}:3"), ("b", f"{second}:1")]


def test_reasoning_may_stand_by_itself() -> None:
    answer = {"role": "assistant", "content": "r", "reasoning_content": "t", "name": "x", "tool_calls": None}
    row = parsed(sft(messages=[*said(("user", "q")), answer]))
    assert isinstance(row, SftRow)
    assert row.messages[1] == {"role": "assistant", "content": "r", "reasoning_content": "t"}


def test_a_byte_order_mark_line_separators_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    text = json.dumps(prompt(messages=said(("user", "a\u2028b"))), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompt_rows([path])[0].messages[0]["content"] == "a\u2028b"
    assert isinstance(parsed(b"\xef\xbb\xbf" + json.dumps(sft()).encode(), is_first=True), SftRow)
    assert parsed(b"\xef\xbb\xbf" + json.dumps(sft()).encode()) == [
        "is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1"
    ]


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
        (sft(id="\ud800"), "id holds a NUL character or half of a surrogate pair, which no text has"),
        (sft(id="a\0b"), "id holds a NUL character or half of a surrogate pair, which no text has"),
        (sft(messages=said(("user", "\ud800"), ("assistant", "r"))), "message 1: holds half of a surrogate pair"),
        (
            sft(messages=[{"role": "user", "content": "q", "reasoning_content": "t"}, *said(("assistant", "r"))]),
            "message 1: reasoning_content",
        ),
        (sft(messages=said(("user", "q\0"), ("assistant", "r"))), "message 1: holds a NUL character"),
        (b'{"id": "a\x00"}', "is not JSON: Invalid control character"),
        (sft(source=3), "source must be a string, got a number"),
    ],
)
def test_each_fault_of_an_sft_row_is_named(line: object, expected: str) -> None:
    (text,) = parsed(line)  # type: ignore[misc]
    assert expected in text


def test_all_faults_of_a_row_are_named() -> None:
    assert len(parsed(sft("", source=1, messages=said(("human", 3), ("assistant", ""))))) == 5  # type: ignore[arg-type]


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
    first = write_jsonl("{", prompt("a"), prompt("", reference=""), name="1.jsonl")
    second = write_jsonl(prompt("a"), name="2.jsonl")
    missing = tmp_path / "none.jsonl"
    with pytest.raises(DataError) as caught:
        read_prompt_rows([first, missing, second, tmp_path])
    text = str(caught.value)
    assert text.startswith("6 problems with the files of data.prompts:")
    assert f"{first}:1: is not JSON" in text
    assert f"{first}:3: id must be" in text
    assert f"{first}:3: reference of a math row must be" in text
    assert f"{missing}: cannot be read (No such file or directory); it is listed in data.prompts" in text
    assert f"{second}:1: has the id 'a' of {first}:2; ids must be unique" in text
    assert f"{tmp_path}: cannot be read (Is a directory)" in text


def test_of_very_many_problems_the_first_are_told_and_the_rest_counted(write_jsonl: Writer) -> None:
    path = write_jsonl(*["{"] * 1000)
    with pytest.raises(DataError) as caught:
        read_prompt_rows([path])
    text = str(caught.value)
    assert text.startswith("1000 problems")
    assert f"{path}:20: " in text
    assert f"{path}:21: " not in text
    assert "... and 980 more" in text


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(prompt()).encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: is not UTF-8 \(byte 12 of the line\)"):
        read_prompt_rows([path])


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_data_set_is_refused(write_jsonl: Writer, lines: list[str]) -> None:
    path = write_jsonl(*lines)
    with pytest.raises(DataError) as caught:
        read_prompt_rows([path])
    assert f"{path}: no rows at all; list a file with rows in data.prompts" in str(caught.value)


def test_no_files_at_all_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.prompts: lists no files"):
        read_prompt_rows([])
