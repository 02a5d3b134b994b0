"""What a stage is, and one unit of its work: a file of rows in, files of rows, a log and an audit out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_klear.curation.audit import Audit
from megatron_klear.curation.files import SPELL_OUT, RowWriter, read_json, read_row_file, sync, write_json
from megatron_klear.curation.reading import InputPart, Reject
from megatron_klear.curation.row import Row, row_schema, to_object
from megatron_klear.data.index.files import digest_of

Advance = Callable[[int], None]
_ROWS_BETWEEN_PROGRESS = 64


class UnitLog:
    """Takes what a stage says of the rows that do not go on, and writes it beside the rows that do.

    Args:
        dropped, rejects: open files for rows left out by a rule, and for rows that cannot be used.

    Attributes:
        audit: counts and examples.
    """

    def __init__(self, dropped: IO[str], rejects: IO[str]) -> None:
        self._dropped, self._rejects = dropped, rejects
        self.audit = Audit()

    def drop(self, row: Row, reason: str, **detail: Any) -> None:
        """Leave a row out by a rule."""
        self.audit.dropped[reason] += 1
        self.audit.example(
            reason, row, "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in detail.items())
        )
        value = {"id": row.row_id, "file": row.file, "line": row.line, "reason": reason, **detail}
        self._dropped.write(json.dumps(value, ensure_ascii=False) + "\n")

    def reject(self, at: Row | Reject, reason: str, kind: str) -> None:
        """Leave a row out because it cannot be used.

        Args:
            at: the row, or where there should have been one.
            reason: what is wrong with it.
            kind: the same in a few words that many rows share, for counting.
        """
        self.audit.rejected[kind] += 1
        value = {"file": at.file, "line": at.line, "reason": reason}
        self._rejects.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


class Stage:
    """A rule that rows go through.

    Attributes:
        name: as in `run.stages`.
        stateless: each row is judged by itself, so that units may be worked on by any process in any order.
        counts: what a person watching sees counted beside the rows; empty for nothing.
    """

    name = ""
    stateless = True
    counts = ""

    def depends_on(self) -> dict[str, Any]:
        """All that its output depends on besides its input; units made under other values are redone."""
        return {}

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Prepare, where rows cannot be judged one at a time; called once, before the first unit that must be made."""

    def watch(self, advance: Advance) -> None:
        """Take what is to be told of every thing counted."""

    def run(self, unit: Path | InputPart, log: UnitLog) -> Iterator[Row]:
        """Yield the rows of a unit that go on; tell the log of all others."""
        assert isinstance(unit, Path)
        return self.apply(_counted(read_row_file(unit), log), log)

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield the rows that go on; tell the log of all others."""
        raise NotImplementedError

    def state_is_whole(self, directory: Path) -> bool:
        """Whether what the stage keeps beside its units is there; without it all units are redone."""
        return True

    def close(self) -> None:
        """Release models and processes; a second call does nothing."""

    def write(self, row: Row, writer: RowWriter) -> None:
        """Hand a row that goes on to the writer."""
        writer.add(to_object(row), row.size)

    schema = staticmethod(row_schema)
    """Makes the Arrow schema of what `write` writes."""


def _counted(rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
    for row in rows:
        log.audit.rows_in += 1
        yield row


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitJob:
    """One unit of a stage's work.

    Attributes:
        number: place in the order of the input.
        unit: the file of rows, or the stretch of an input file.
        directory: of the stage.
        rows: directory of the rows that are made.
        file_format: of these.
        rows_per_file: most rows of one file.
    """

    number: int
    unit: Path | InputPart
    directory: Path
    rows: Path
    file_format: str
    rows_per_file: int

    @property
    def manifest(self) -> Path:
        """Says what the unit made; there when all of it is."""
        return self.directory / "units" / f"{self.number:06d}.json"

    def log(self, kind: str) -> Path:
        """File of rows that were dropped or rejected."""
        return self.directory / "log" / f"{self.number:06d}-{kind}.jsonl"


def do_unit(stage: Stage, job: UnitJob, advance: Advance = lambda count: None) -> dict[str, Any]:
    """Make one unit and return its manifest.

    Raises:
        OSError: files cannot be read or written.
    """
    began, cpu_began = time.monotonic(), time.process_time()
    job.manifest.unlink(missing_ok=True)
    logs = {kind: job.log(kind) for kind in ("dropped", "rejects")}
    stem = job.rows / f"{job.number:06d}"
    for leftover in job.rows.glob(f"{stem.name}-*"):
        leftover.unlink()
    with ExitStack() as stack:
        opened = {
            kind: stack.enter_context(path.open("w", encoding="utf-8", errors=SPELL_OUT)) for kind, path in logs.items()
        }
        log = UnitLog(opened["dropped"], opened["rejects"])
        writer = stack.enter_context(RowWriter(stem, job.file_format, stage.schema, job.rows_per_file))
        told = 0
        for row in stage.run(job.unit, log):
            log.audit.rows_out += 1
            stage.write(row, writer)
            if log.audit.rows_in - told >= _ROWS_BETWEEN_PROGRESS:
                advance(log.audit.rows_in - told)
                told = log.audit.rows_in
    advance(log.audit.rows_in - told)
    for path in logs.values():
        sync(path)
    files = {os.path.relpath(path, job.directory): digest_of(path) for path in [*writer.files, *logs.values()]}
    rows = [os.path.relpath(path, job.directory) for path in writer.files]
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    manifest = {
        "number": job.number,
        "rows": rows,
        "digests": files,
        "audit": log.audit.to_object(),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
    }
    write_json(job.manifest, manifest)
    return manifest


def finished_unit(job: UnitJob) -> dict[str, Any] | None:
    """The manifest of a unit that is done, its files compared with the digests noted in it; else None."""
    manifest = read_json(job.manifest)
    try:
        whole = all(digest_of(job.directory / name) == digest for name, digest in manifest["digests"].items())
        return dict(manifest) if whole else None
    except (OSError, KeyError, TypeError, AttributeError):
        return None
