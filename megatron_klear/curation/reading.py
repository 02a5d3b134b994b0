"""Input files into rows, one at a time; whatever is wrong with a row makes it a reject and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_klear.curation.row import Response, Row
from megatron_klear.data.index.parts import Part, plan_parts, read_part
from megatron_klear.data.jsonl import JsonObject, json_type
from megatron_klear.data.rows import DOMAINS, has_lone_surrogate, id_and_messages, reference_text

COLUMNS = ("id", "domain", "messages", "reference", "source", "responses", "pass_rate", "embedding")
"""What is read of a row; other keys are passed over."""

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPart:
    """A stretch of an input file and the number of its first line, counted from 1."""

    part: Part
    file: str
    first_line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A row that cannot be used; the names are those of rejects.jsonl."""

    file: str
    line: int
    reason: str


def plan_input(files: Sequence[str], part_bytes: int, *, setting: str = "input.files") -> list[InputPart]:
    """Cut the input into parts, in order.

    Raises:
        DataError: naming every file that is no Parquet file though it is called so, or lacks a column.
    """
    planned: list[InputPart] = []
    for number, parts in itertools.groupby(plan_parts(files, part_bytes, setting=setting), key=lambda part: part.file):
        listed = list(parts)
        lines = _first_lines(files[number], listed)
        planned += [
            InputPart(part=p, file=files[number], first_line=line) for p, line in zip(listed, lines, strict=True)
        ]
    return planned


def _first_lines(name: str, parts: Sequence[Part]) -> list[int]:
    """Number of the first line (or Parquet row) that begins in each part of a file."""
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(name) as file:
            rows = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        return [1 + sum(rows[: part.start]) for part in parts]
    lines, counted, position = [], 0, 0
    with open(name, "rb") as file:
        for part in parts:
            # A line begins in the part where its first byte is: one more line break lies before that byte.
            while position < part.start - 1 and (block := file.read(min(_BLOCK_BYTES, part.start - 1 - position))):
                counted += block.count(b"\n")
                position += len(block)
            lines.append(counted + (2 if part.start else 1))
    return lines


def read_rows(source: InputPart, max_row_bytes: int) -> Iterator[Row | Reject]:
    """Yield every row of a part, or the reason why it is none; empty lines are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    values = read_part(source.part, source.file, max_row_bytes, columns=COLUMNS)
    for line, value in enumerate(values, start=source.first_line):
        if value is None:
            continue
        row = [value] if isinstance(value, str) else parse_row(value, source.file, line)
        yield row if isinstance(row, Row) else Reject(file=source.file, line=line, reason="; ".join(row))


def parse_row(value: JsonObject, file: str, line: int) -> Row | list[str]:
    """An object of a file as a row, or everything that is wrong with it.

    The conversation ends with the question. A last message of the assistant is a response, beside those of the key
    `responses`, which are texts or objects {"text", "finish_reason"?}.
    """
    messages, answered = value.get("messages"), None
    if isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-1], dict):
        last = {k: v for k, v in messages[-1].items() if v is not None}
        if last.get("role") == "assistant":
            answered, messages = last, messages[:-1]
    asked = value if answered is None else {**value, "messages": messages}
    row_id, kept, wrong = id_and_messages(asked, "user")
    domain: Any = value.get("domain")
    if domain not in DOMAINS:
        got = "none" if domain is None else json_type(domain) if not isinstance(domain, str) else repr(domain[:40])
        wrong.append(f"domain must be one of {', '.join(DOMAINS)}, got {got}")
    reference = None
    if value.get("reference") is not None and domain in DOMAINS:
        reference, more = reference_text(domain, value["reference"])
        wrong += more + _text_faults("reference", reference)
    responses, more = _responses(value.get("responses"), answered)
    wrong += more
    source, pass_rate, embedding = value.get("source") or "", value.get("pass_rate"), value.get("embedding")
    if not isinstance(source, str):
        wrong.append(f"source must be a string, got {json_type(source)}")
    else:
        wrong += _text_faults("source", source)
    if pass_rate is not None and not (_is_number(pass_rate) and 0 <= pass_rate <= 1):
        wrong.append(f"pass_rate must be a number from 0 to 1, got {_shown(pass_rate)}")
    if embedding is not None and not (isinstance(embedding, list) and embedding and all(map(_is_number, embedding))):
        wrong.append("embedding must be a list of finite numbers")
    if wrong:
        return wrong
    return Row(
        row_id=row_id, domain=domain, source=source, messages=[dict(m) for m in kept], reference=reference,
        file=file, line=line, responses=responses, pass_rate=None if pass_rate is None else float(pass_rate),
        embedding=embedding,
    )  # fmt: skip


def _responses(listed: object, answered: dict[str, Any] | None) -> tuple[list[Response], list[str]]:
    if listed is not None and not isinstance(listed, list):
        return [], [f"responses must be a list, got {json_type(listed)}"]
    values: list[Any] = list(listed or ())
    if answered is not None:
        content, thinking = answered.get("content"), answered.get("reasoning_content")
        if isinstance(thinking, str) and isinstance(content, str):
            content = f"<think>\n{thinking}\n</think>\n\n{content}"
        values.insert(0, content)
    responses, wrong = [], []
    for number, value in enumerate(values, start=1):
        text = value.get("text") if isinstance(value, dict) else value
        finish = (value.get("finish_reason") if isinstance(value, dict) else None) or "stop"
        if not isinstance(text, str) or not text.strip():
            wrong.append(f"response {number} must be a non-empty string or an object with one in text")
        elif finish not in ("stop", "length"):
            wrong.append(f"response {number}: finish_reason must be stop or length, got {_shown(finish)}")
        else:
            wrong += _text_faults(f"response {number}", text)
            responses.append(Response(text=text, finish_reason=finish))
    return responses, wrong


def _text_faults(what: str, text: str) -> list[str]:
    faults = [f"{what} holds a NUL character, which no text has"] if "\0" in text else []
    return faults + ([f"{what} holds half of a surrogate pair"] if has_lone_surrogate(text) else [])


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _shown(value: object) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else json_type(value)
