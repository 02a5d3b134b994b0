"""Which row came first with a key: on disk, so that memory does not grow with the number of rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

_CACHE_KIBIBYTES = 64 << 10
"""Most memory for pages of the table."""


class FirstSeen:
    """Keys and the place where each was seen first; asking again gives the same answers, so work may be repeated.

    Args:
        file: SQLite file, made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        # A unit whose files outlive a power cut must not be one whose keys did not: its duplicates would come again.
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, place TEXT NOT NULL) WITHOUT ROWID"
        )

    def claim(self, keys: Sequence[bytes], places: Sequence[str]) -> list[str]:
        """For each key the place that had it first, which is the given one where nobody had it before.

        Args:
            keys: 16 bytes each, in the order of the rows.
            places: where each row stands; unique.
        """
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", zip(keys, places, strict=True))
        first = [execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()[0] for key in keys]
        execute("COMMIT")
        return first

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._connection.close()


def is_whole(file: Path) -> bool:
    """Whether a file of a `FirstSeen` is there and undamaged."""
    if not file.is_file():
        return False
    try:
        connection = sqlite3.connect(file)
        try:
            return bool(connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.Error:
        return False
