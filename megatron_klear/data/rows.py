"""Rows of the input files: what they must hold, checked before any tokenizer is loaded.

SFT row:    {"id", "messages": [{"role", "content"}, ...], "source"?}; ends with an assistant message
Prompt row: {"id", "domain": "math" | "code", "messages": [...], "reference"}; ends with a user message
Other keys are passed over, so files may carry columns of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from megatron_klear.data.jsonl import JsonObject, json_type, read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.records import Domain

Message = dict[str, str]
"""`role` and `content`; assistant messages may also have `reasoning_content`, the thinking part by itself."""

ROLES = ("system", "user", "assistant")
DOMAINS = get_args(Domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftRow:
    """A conversation to fine-tune on; `where` is "file:line"."""

    row_id: str
    messages: tuple[Message, ...]
    source: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A problem to reinforce on or to evaluate with; `where` is "file:line"."""

    row_id: str
    domain: Domain
    messages: tuple[Message, ...]
    reference: str
    where: str


class _Row(Protocol):
    @property
    def row_id(self) -> str: ...

    @property
    def where(self) -> str: ...


RowT = TypeVar("RowT", bound=_Row)


def read_prompt_rows(paths: Sequence[str | Path], *, setting: str = "data.prompts") -> list[PromptRow]:
    """Read all prompt rows of all files.

    Raises:
        DataError: naming file and line of everything that is wrong, duplicate ids and an empty data set included.
    """
    return _read(paths, prompt_row, setting)


def _read(
    paths: Sequence[str | Path], parse: Callable[[str, JsonObject], RowT | list[str]], setting: str
) -> list[RowT]:
    problems = Problems(f"the files of {setting}")
    rows: list[RowT] = []
    first_place: dict[str, str] = {}
    for where, value in read_objects(paths, problems, setting=setting):
        row = parse(where, value)
        if isinstance(row, list):
            for text in row:
                problems.add(where, text)
        elif row.row_id in first_place:
            problems.add(where, f"has the id {row.row_id!r} of {first_place[row.row_id]}; ids must be unique")
        else:
            first_place[row.row_id] = where
            rows.append(row)
    if not rows and not problems:
        names = ", ".join(map(str, paths))
        problems.add(names, f"no rows at all; list a file with rows in {setting}")
    problems.raise_if_any()
    return rows


def parse_sft_row(where: str, value: JsonObject) -> SftRow | list[str]:
    """An object of a file as an SFT row, or everything that is wrong with it."""
    row_id, messages, wrong = id_and_messages(value, "assistant")
    source = value.get("source")
    source = "" if source is None else source  # what a row leaves out is null in Parquet
    if not isinstance(source, str):
        wrong.append(f"source must be a string, got {json_type(source)}")
    return wrong or SftRow(row_id=row_id, messages=messages, source=source, where=where)


def prompt_row(where: str, value: JsonObject) -> PromptRow | list[str]:
    """The prompt row that an object holds, or everything that is wrong with it."""
    row_id, messages, wrong = id_and_messages(value, "user")
    domain: Any = value.get("domain")
    if domain not in DOMAINS:
        wrong.append(f"domain must be one of {', '.join(DOMAINS)}, got {json.dumps(domain)}")
        return wrong
    reference, problem = reference_text(domain, value.get("reference"))
    wrong += problem
    return wrong or PromptRow(row_id=row_id, domain=domain, messages=messages, reference=reference, where=where)


def id_and_messages(value: JsonObject, last_role: str) -> tuple[str, tuple[Message, ...], list[str]]:
    """Id and messages of an object, the last message being of `last_role`; and everything that is wrong with them."""
    row_id, wrong = value.get("id"), []
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        got = "none" if "id" not in value else json_type(row_id)
        wrong.append(f"id must be a non-empty string or a whole number, got {got}")
    elif isinstance(row_id, str) and (has_lone_surrogate(row_id) or "\0" in row_id):
        wrong.append("id holds a NUL character or half of a surrogate pair, which no text has")
    listed = value.get("messages")
    if not isinstance(listed, list) or not listed:
        got = "none" if "messages" not in value else "an empty list" if listed == [] else json_type(listed)
        return str(row_id), (), [*wrong, f"messages must be a non-empty list, got {got}"]
    faults = [text for number, message in enumerate(listed, start=1) for text in _message_faults(number, message)]
    if not faults and next((m["role"] for m in listed if m["role"] != "system"), "") == "assistant":
        faults.append("the first message must be of role user (or system), got assistant")
    if not faults and listed[-1]["role"] != last_role:
        faults.append(f"the last message must be of role {last_role}, got {listed[-1]['role']}")
    if faults:
        return str(row_id), (), [*wrong, *faults]
    kept = ("role", "content", "reasoning_content")
    return str(row_id), tuple({key: m[key] for key in kept if m.get(key) is not None} for m in listed), wrong


def _message_faults(number: int, message: object) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"message {number} must be an object, got {json_type(message)}"
        return
    role, content, reasoning = message.get("role"), message.get("content"), message.get("reasoning_content")
    if role not in ROLES:
        yield f"message {number}: role must be one of {', '.join(ROLES)}, got {json.dumps(role)}"
    elif role == "system" and number > 1:
        yield f"message {number}: a system message must come first"
    if not isinstance(content, str):
        yield f"message {number}: content must be a string, got {json_type(content)}"
    elif not content.strip():
        yield f"message {number}: content is empty"
    texts = [text for text in (content, reasoning) if isinstance(text, str)]
    if any(has_lone_surrogate(text) for text in texts):
        yield f"message {number}: holds half of a surrogate pair, which is no character"
    if any("\0" in text for text in texts):
        yield f"message {number}: holds a NUL character, which no text has"
    if reasoning is not None and (role != "assistant" or not isinstance(reasoning, str)):
        yield f"message {number}: reasoning_content must be a string in an assistant message"


def has_lone_surrogate(text: str) -> bool:
    """JSON can spell code points that no UTF-8 text, and so no tokenizer, can hold."""
    return any("\ud800" <= char <= "\udfff" for char in text) if not text.isascii() else False


def reference_text(domain: Domain, reference: object) -> tuple[str, list[str]]:
    """The gold answer as text, or the tests as JSON text; and what is wrong with it."""
    if domain == "code":
        if isinstance(reference, (list, dict)) and reference:
            return json.dumps(reference), []
        if isinstance(reference, str):
            try:
                json.loads(reference)
            except ValueError:
                return "", ["reference of a code row must hold its tests as JSON, got a string that is not JSON"]
            return reference, []
        return "", [f"reference of a code row must hold its tests as JSON, got {json_type(reference)}"]
    if isinstance(reference, int) and not isinstance(reference, bool):
        return str(reference), []
    if isinstance(reference, str) and reference.strip():
        return reference, []
    got = "an empty string" if isinstance(reference, str) else json_type(reference)
    return "", [f"reference of a math row must be the answer as a non-empty string or a whole number, got {got}"]
