"""Exact duplicates of prompts, over all files: of equal prompts the first stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.batches import batches
from megatron_klear.curation.first_seen import FirstSeen, is_whole
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog
from megatron_klear.data.overlap import text_key

SEEN_FILE = "prompts.sqlite"
_BATCH_ROWS = 1000


def prompt_key(text: str, *, ignore_spelling: bool) -> bytes:
    """What equal prompts have in common: 16 bytes of a digest of the text.

    Args:
        text: the prompt.
        ignore_spelling: regard neither case nor spacing nor Unicode variants (NFKC, casefold, one space between words).
    """
    if ignore_spelling:
        return bytes.fromhex(text_key(text))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class DedupStage(Stage):
    """Leaves out every prompt that an earlier row has.

    Args:
        settings: of the run.
    """

    name = "dedup"
    stateless = False

    def __init__(self, settings: CurationSettings) -> None:
        self._ignore_spelling = settings.dedup.ignore_spelling
        self._seen: FirstSeen | None = None

    def depends_on(self) -> dict[str, Any]:
        """The rule of comparison."""
        return {"ignore_spelling": self._ignore_spelling}

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Open the file of prompts seen."""
        self._seen = FirstSeen(directory / SEEN_FILE)

    def state_is_whole(self, directory: Path) -> bool:
        """Whether the prompts of finished units are known."""
        return is_whole(directory / SEEN_FILE)

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows whose prompt is new."""
        assert self._seen is not None
        for batch in batches(rows, _BATCH_ROWS):
            keys = [prompt_key(row.prompt_text, ignore_spelling=self._ignore_spelling) for row in batch]
            places = [f"{row.file}:{row.line}" for row in batch]
            for row, place, first in zip(batch, places, self._seen.claim(keys, places), strict=True):
                if first == place:
                    yield row
                else:
                    log.drop(row, "duplicate", first_at=first)

    def close(self) -> None:
        """Close the file of prompts seen."""
        if self._seen is not None:
            self._seen.close()
