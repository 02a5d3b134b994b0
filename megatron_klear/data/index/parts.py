"""Input files in parts of about equal size, and the rows of a part, one by one, whatever is wrong with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.jsonl import JsonObject, parse_line
from megatron_klear.data.problems import Problems

PART_BYTES = 64 << 20
"""Input of a part: what is lost at most, per process, when tokenizing is killed."""

LINE_BYTES = 8 << 20
"""Longest line that is read at all; some sixty times the text of 32K tokens."""

_COLUMNS = ("id", "messages", "source")
_REQUIRED = ("id", "messages")
_PARQUET_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of one input file.

    Attributes:
        file: number of the file in the list of files.
        start, end: bytes (JSON lines: the lines that begin there), or row groups (Parquet).
        input_bytes: how much of the file it is, for the time left.
    """

    file: int
    start: int
    end: int
    input_bytes: int


def plan_parts(
    files: Sequence[str],
    part_bytes: int = PART_BYTES,
    *,
    setting: str = "data.sft",
    required: Sequence[str] = _REQUIRED,
) -> list[Part]:
    """Cut files into parts, in order.

    Args:
        files: JSON lines or Parquet, by their names.
        part_bytes: input of a part, about.
        setting: dotted path of the setting that lists the files, for messages.
        required: columns that Parquet files must have.

    Raises:
        DataError: naming every file that is no Parquet file though it is called so, or lacks a column.
    """
    problems = Problems(f"the files of {setting}")
    parts: list[Part] = []
    for number, name in enumerate(files):
        if name.endswith(".parquet"):
            parts += _row_groups(number, name, part_bytes, required, problems)
            continue
        size = Path(name).stat().st_size
        count = max(1, round(size / part_bytes))
        cuts = [size * i // count for i in range(count + 1)]
        parts += [Part(file=number, start=a, end=b, input_bytes=b - a) for a, b in itertools.pairwise(cuts)]
    problems.raise_if_any(f"Mend these files or take them out of {setting}.")
    return parts


def read_part(
    part: Part, name: str, line_bytes: int = LINE_BYTES, *, columns: Sequence[str] = _COLUMNS
) -> Iterator[JsonObject | str | None]:
    """Yield for each line (or Parquet row) of a part its object, or what is wrong with it, or None where it is empty.

    Args:
        part: which stretch.
        name: the file.
        line_bytes: longest line of JSON to read, its end not counted.
        columns: columns of Parquet to read, where they are there.

    Raises:
        OSError: the file cannot be read.
    """
    return _parquet_rows(part, name, columns) if name.endswith(".parquet") else _json_lines(part, name, line_bytes)


def _json_lines(part: Part, name: str, line_bytes: int) -> Iterator[JsonObject | str | None]:
    with open(name, "rb") as stream:
        if part.start:
            stream.seek(part.start - 1)
            while (skipped := stream.readline(line_bytes)) and not skipped.endswith(b"\n"):
                pass  # the line that began in the part before
        while stream.tell() < part.end:
            is_first = stream.tell() == 0
            raw = stream.readline(line_bytes + 1)
            if not raw:
                return  # the file has become shorter
            if len(raw) <= line_bytes or raw.endswith(b"\n"):
                yield parse_line(raw, is_first=is_first)
                continue
            while (rest := stream.readline(line_bytes)) and not rest.endswith(b"\n"):
                pass
            yield f"is longer than {line_bytes} bytes"


def _row_groups(number: int, name: str, part_bytes: int, required: Sequence[str], problems: Problems) -> list[Part]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            columns = file.schema_arrow.names
            groups = [file.metadata.row_group(g).total_byte_size for g in range(file.metadata.num_row_groups)]
    except Exception as error:  # whatever a damaged file makes the library raise
        problems.add(name, f"is not a Parquet file: {' '.join(str(error).split())}")
        return []
    for column in required:
        if column not in columns:
            problems.add(name, f"has no column {column}; it has {', '.join(columns)}")
    parts, start, size = [], 0, 0
    for group, group_bytes in enumerate(groups):
        size += group_bytes
        if size >= part_bytes or group == len(groups) - 1:
            parts.append(Part(file=number, start=start, end=group + 1, input_bytes=size))
            start, size = group + 1, 0
    return parts


def _parquet_rows(part: Part, name: str, wanted: Sequence[str]) -> Iterator[JsonObject | str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(name) as file:
        columns = [column for column in wanted if column in file.schema_arrow.names]
        for group in range(part.start, part.end):
            left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=columns):
                    yield from _batch_rows(batch)
                    left -= batch.num_rows
            except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the system could not read it, which says nothing of its rows
                reason = f"row group {group} cannot be read: {' '.join(str(error).split())}"
                yield from [reason] * left


def _batch_rows(batch: Any) -> Iterator[JsonObject | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # one bad text spoils the batch: row by row
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                yield "is not UTF-8"
