"""Reads JSON lines: one object per line, every problem named with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_klear.data.problems import Problems

JsonObject = dict[str, Any]


def read_objects(paths: Sequence[str | Path], problems: Problems, *, setting: str) -> Iterator[tuple[str, JsonObject]]:
    """Yield the objects of all files in order; empty lines are passed over.

    Args:
        paths: the files.
        problems: takes what cannot be read: missing files, bad encoding, lines that are not JSON objects.
        setting: dotted path of the setting that lists the files, for messages.

    Yields:
        (where, object), `where` being "file:line".
    """
    if not paths:
        problems.add(setting, "lists no files")
    for path in map(Path, paths):
        try:
            with path.open("rb") as file:
                yield from _objects_of(path, enumerate(file, start=1), problems)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            problems.add(str(path), f"cannot be read ({reason}); it is listed in {setting}")


def _objects_of(
    path: Path, numbered_lines: Iterator[tuple[int, bytes]], problems: Problems
) -> Iterator[tuple[str, JsonObject]]:
    for number, raw in numbered_lines:
        where = f"{path}:{number}"
        value = parse_line(raw, is_first=number == 1)
        if isinstance(value, str):
            problems.add(where, value)
        elif value is not None:
            yield where, value


def parse_line(raw: bytes, *, is_first: bool = False) -> JsonObject | str | None:
    """The object of one line, or what is wrong with the line, or None where it is empty.

    Args:
        raw: the line, its end included or not.
        is_first: whether it is the first of its file, which may start with a byte order mark.
    """
    if is_first:
        raw = raw.removeprefix(b"\xef\xbb\xbf")  # as some editors leave it
    if not raw.strip():
        return None
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.colno}"
    except ValueError:
        # Python's limit against numbers that take minutes to read.
        return "is not usable JSON: a number has too many digits"
    except RecursionError:
        return "is not usable JSON: nested too deeply"
    return value if isinstance(value, dict) else f"must be a JSON object, got {json_type(value)}"


def json_type(value: object) -> str:
    """Name of a JSON value's type for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
