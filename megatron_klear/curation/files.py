"""Files of rows: written in bounded memory, read back a few at a time, and recognised as whole by their digests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megatron_klear.curation.row import Row, from_object

_BUFFER_ROWS = 1000
_BUFFER_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 20

SPELL_OUT = "backslashreplace"
"""How JSON that is written for people to read spells half of a surrogate pair, which UTF-8 cannot: as JSON does."""


class RowWriter:
    """Writes objects to files `STEM-000.FORMAT`, `STEM-001.FORMAT`, ...; each appears under its name when it is whole.

    Args:
        stem: path without number and ending.
        file_format: `parquet` or `jsonl`.
        schema: makes the Arrow schema of Parquet.
        rows_per_file: a new file is begun after so many.
    """

    def __init__(self, stem: Path, file_format: str, schema: Callable[[], Any], rows_per_file: int) -> None:
        self._stem, self._format, self._schema, self._limit = stem, file_format, schema, rows_per_file
        self._open: Any = None
        self._rows_in_file = self._buffered = 0
        self._buffer: list[Mapping[str, Any]] = []
        self.files: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            self._open.close()

    def add(self, value: Mapping[str, Any], size: int) -> None:
        """Take one more object; `size` is about its number of characters."""
        self._buffer.append(value)
        self._buffered += size
        self._rows_in_file += 1
        full = self._rows_in_file >= self._limit
        if len(self._buffer) >= _BUFFER_ROWS or self._buffered >= _BUFFER_CHARACTERS or full:
            self._flush()
        if full:
            self._finish()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._open is None:
            path = self._stem.with_name(f"{self._stem.name}-{len(self.files):03d}.{self._format}")
            self.files.append(path)
            self._open = _opened(_unfinished(path), self._format, self._schema)
        self._open.write(self._buffer)
        self._buffer, self._buffered = [], 0

    def _finish(self) -> None:
        self._flush()
        if self._open is None:
            return
        self._open.close()
        self._open, self._rows_in_file = None, 0
        sync(_unfinished(self.files[-1]))
        os.replace(_unfinished(self.files[-1]), self.files[-1])


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")

    def write(self, values: list[Mapping[str, Any]]) -> None:
        self._file.writelines(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow.parquet as pq

        self._schema = schema
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, values: list[Mapping[str, Any]]) -> None:
        import pyarrow as pa

        self._file.write_table(pa.Table.from_pylist(values, schema=self._schema))

    def close(self) -> None:
        self._file.close()


def _opened(path: Path, file_format: str, schema: Callable[[], Any]) -> _JsonLines | _Parquet:
    return _JsonLines(path) if file_format == "jsonl" else _Parquet(path, schema())


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of one file that a `RowWriter` wrote, a few in memory at a time."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        size = sum(file.metadata.row_group(g).total_byte_size for g in range(file.metadata.num_row_groups))
        rows = _READ_BYTES * file.metadata.num_rows // max(size, 1)
        for batch in file.iter_batches(min(max(rows, 1), _BUFFER_ROWS)):
            yield from batch.to_pylist()


def read_row_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file."""
    return map(from_object, read_objects(path))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is on disk, whole, when it appears under its name."""
    fresh = _unfinished(path)
    fresh.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors=SPELL_OUT)
    sync(fresh)
    os.replace(fresh, path)


def read_json(path: Path) -> Any:
    """The value of a JSON file, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sync(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
