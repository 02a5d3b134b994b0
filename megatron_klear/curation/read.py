"""The first stage: input files into rows, with everything unusable in the log of rejects."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_klear.config.curation import CurationSettings, input_files
from megatron_klear.curation.batches import batches
from megatron_klear.curation.first_seen import FirstSeen, is_whole
from megatron_klear.curation.grading import RowGraders
from megatron_klear.curation.reading import InputPart, Reject, read_rows
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog

IDS_FILE = "ids.sqlite"
_BATCH_ROWS = 256


class ReadStage(Stage):
    """Reads and checks rows; ids must be unique over all input.

    Args:
        settings: of the run.
    """

    name = "read"
    stateless = False
    counts = "rows"

    def __init__(self, settings: CurationSettings) -> None:
        self._settings = settings
        self._graders = RowGraders(settings)
        self._ids: FirstSeen | None = None

    def depends_on(self) -> dict[str, Any]:
        """The files by name, size and time of change, and the rules of reading."""
        status = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in input_files(self._settings)]
        given = self._settings.input
        return {"files": status, "max_row_bytes": given.max_row_bytes, "check_references": given.check_references}

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Open the file of ids."""
        self._ids = FirstSeen(directory / IDS_FILE)

    def state_is_whole(self, directory: Path) -> bool:
        """Whether the ids of finished units are known."""
        return is_whole(directory / IDS_FILE)

    def run(self, unit: Path | InputPart, log: UnitLog) -> Iterator[Row]:
        """Yield the usable rows of a stretch of an input file."""
        assert isinstance(unit, InputPart)
        for batch in batches(read_rows(unit, self._settings.input.max_row_bytes), _BATCH_ROWS):
            log.audit.rows_in += len(batch)
            yield from self._judged(batch, log)

    def close(self) -> None:
        """End the graders and close the file of ids."""
        self._graders.close()
        if self._ids is not None:
            self._ids.close()

    def _judged(self, batch: Sequence[Row | Reject], log: UnitLog) -> Iterator[Row]:
        assert self._ids is not None
        rows = []
        for item in batch:
            if isinstance(item, Reject):
                log.reject(item, item.reason, _kind(item.reason))
            else:
                rows.append(item)
        if self._settings.input.check_references:
            bad = {id(row): text for row, text in self._graders.reference_faults(rows)}
            for row in rows:
                if id(row) in bad:
                    log.reject(row, bad[id(row)], "reference that cannot be graded against")
            rows = [row for row in rows if id(row) not in bad]
        keys = [hashlib.blake2b(row.row_id.encode(), digest_size=16).digest() for row in rows]
        places = [f"{row.file}:{row.line}" for row in rows]
        for row, place, first in zip(rows, places, self._ids.claim(keys, places), strict=True):
            if first != place:
                log.reject(row, f"has the id {row.row_id!r} of {first}; ids must be unique", "repeated id")
                continue
            log.audit.count("rows by source", row.source or "(none)")
            log.audit.count("rows by domain", row.domain)
            yield row


def _kind(reason: str) -> str:
    """The kind of a fault: what a reason says before it goes into particulars."""
    for start, kind in (
        ("is not UTF-8", "not UTF-8"),
        ("is not JSON", "not JSON"),
        ("is not usable JSON", "not JSON"),
        ("must be a JSON object", "not an object"),
        ("is longer than", "too long"),
        ("row group", "damaged Parquet"),
    ):
        if reason.startswith(start):
            return kind
    if "NUL" in reason or "surrogate" in reason:
        return "characters that no text has"
    return "missing or wrong field"
