"""Sampled responses on disk, each found by everything that it depends on; a kill loses only what was unfinished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_klear.errors import RolloutError
from megatron_klear.records import IntArray, Rollout
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import encoding
from megatron_klear.rollout.ledger.database import WriterLock

APPLICATION_ID = 0x4B4C5243
"""Marks the file as a cache of responses ("KLRC")."""

SCHEMA_VERSION = 1

_TABLES = """
CREATE TABLE responses (
    key BLOB NOT NULL UNIQUE,
    token_ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    finish_reason TEXT NOT NULL,
    versions TEXT NOT NULL,
    digest BLOB NOT NULL
);
"""


def response_key(model: str, token_ids: IntArray, sampling: SamplingParams, *, seed: int, index: int) -> bytes:
    """What a response is found by: 16 bytes that differ whenever anything differs that the response depends on.

    Args:
        model: fingerprint of the weights and of how they are computed with.
        token_ids: int64 [L], the prompt.
        sampling: how tokens are drawn.
        seed: of the whole sampling.
        index: number of the response to this prompt.
    """
    head = {"model": model, "sampling": asdict(sampling), "seed": seed, "index": index}
    digest = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
    digest.update(b"\0" + encoding.pack_tokens(token_ids))
    return digest.digest()


class ResponseCache:
    """A file of responses with one writer; use it as a context manager.

    Every response is a transaction of its own and carries a digest of its content. One that was being written when
    the process was killed is not there; one whose bytes have changed since is removed, counted and drawn anew.

    Args:
        file: SQLite file, made where it is missing.
        setting: dotted path of the setting that says where it is, for messages.

    Attributes:
        damaged: responses found damaged so far.

    Raises:
        RolloutError: in use by another process, unreadable, or another kind of file.
    """

    def __init__(self, file: str | Path, *, setting: str = "sampler.cache") -> None:
        self.file, self._setting = Path(file), setting
        self.damaged = 0
        with self._readable_errors():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.file, setting)
        try:
            with self._readable_errors():
                self._connection = self._open()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        with self._readable_errors():
            return int(self._connection.execute("SELECT COUNT(*) FROM responses").fetchone()[0])

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def get(self, key: bytes) -> Rollout | None:
        """The response of a key, or None where there is none that is whole."""
        with self._readable_errors():
            row = self._connection.execute(
                "SELECT token_ids, logprobs, finish_reason, versions, digest FROM responses WHERE key = ?", (key,)
            ).fetchone()
            if row is None:
                return None
            if _digest(key, row[:4]) != row[4]:
                self._connection.execute("DELETE FROM responses WHERE key = ?", (key,))
                self.damaged += 1
                return None
        return Rollout(
            response_ids=encoding.unpack_tokens(row[0]),
            rollout_logprobs=encoding.unpack_logprobs(row[1]),
            finish_reason=row[2],
            policy_versions=encoding.unpack_versions(row[3]),
        )

    def put(self, key: bytes, rollout: Rollout) -> None:
        """Store a complete response; it outlives this process from the return on.

        Raises:
            RolloutError: it cannot be written (a full disk, say), or was interrupted and so is not complete.
        """
        if rollout.finish_reason == "abort":
            raise RolloutError(f"{self.file}: an interrupted response is not complete and cannot be stored")
        content = (
            encoding.pack_tokens(rollout.response_ids),
            encoding.pack_logprobs(rollout.rollout_logprobs),
            str(rollout.finish_reason),
            encoding.pack_versions(rollout.policy_versions),
        )
        with self._readable_errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", (key, *content, _digest(key, content))
            )

    def close(self) -> None:
        """Close the file and let others write; a second call does nothing."""
        self._connection.close()
        self._lock.release()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
        try:
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if not tables:
                connection.execute("PRAGMA journal_mode = WAL")
                marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
                connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} {marks} COMMIT;")
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if (found, version) != (APPLICATION_ID, SCHEMA_VERSION):
                raise RolloutError(
                    f"{self.file} is no cache of responses of this version of megatron_klear; choose another "
                    f"{self._setting}"
                )
            # A power cut may cost the last responses, never the file; a killed process costs nothing.
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise
        except (sqlite3.Error, OSError) as error:
            raise RolloutError(
                f"{self.file}: the cache of responses cannot be used ({error}). Free disk space if that is it; else "
                f"move the file aside, which costs the responses in it, or choose another {self._setting}"
            ) from error


def _digest(key: bytes, content: tuple[bytes, bytes, str, str]) -> bytes:
    digest = hashlib.blake2b(key, digest_size=16)
    for part in content:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
