"""Rows a few at a time, never more text than fits in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from megatron_klear.curation.reading import Reject
from megatron_klear.curation.row import Row

BATCH_CHARACTERS = 1 << 20

ItemT = TypeVar("ItemT", bound=Row | Reject)


def batches(rows: Iterable[ItemT], most: int) -> Iterator[list[ItemT]]:
    """Yield lists of at most `most` rows, and of about `BATCH_CHARACTERS` of text at most."""
    batch: list[ItemT] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size if isinstance(row, Row) else 0
        if len(batch) >= most or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
