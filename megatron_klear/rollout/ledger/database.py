"""Opening a ledger's file: durable for its one writer, harmless for readers, and errors in words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger import schema

_BUSY_SECONDS = 30.0
"""How long a statement waits for a lock; readers never block the writer, only a second writer or a backup does."""

_NO_SHARED_MEMORY = ("SQLITE_READONLY", "SQLITE_CANTOPEN")
"""How the errors begin by which SQLite says that it cannot make a file beside the ledger."""

_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 5, 0.1


class WriterLock:
    """Makes this process the only writer of a ledger; the kernel frees it when the process ends, however that is.

    Args:
        file: the ledger, or another file with one writer; the lock is a file beside it.
        setting: dotted path of the setting that says where the file is.

    Raises:
        RolloutError: another process holds it; says which.
    """

    def __init__(self, file: Path, setting: str = "run.dir") -> None:
        path = file.with_name(file.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
        except OSError as error:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise RolloutError(
                f"{file} is in use: {holder} writes to it. End that run first, or choose another {setting}"
            ) from error
        with contextlib.suppress(OSError):  # who holds it is a courtesy; a full disk must be met where it matters
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _lock(self) -> None:
        for _ in range(_LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(_LOCK_PAUSE_SECONDS)  # a reader that asks whether there is a writer has it for a moment
        return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_for_writing(file: Path) -> sqlite3.Connection:
    """Open, and make where it is missing; every commit is on disk when it returns.

    WAL lets people read while the run writes. `synchronous=FULL` makes a commit survive a power cut: a checkpoint that
    is on disk must never know of training that the ledger has forgotten. What it costs, one sync of the log per
    commit, is shared by all that is committed together (`manager/journal.py`).

    Raises:
        RolloutError: unreadable, damaged, of another schema, or not writable.
    """
    with readable_errors(file):
        connection = sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise RolloutError(
                    f"{file}: SQLite cannot keep a write-ahead log there (journal mode {mode}); run.dir must be on a "
                    "file system with shared memory, which some network file systems are not"
                )
            connection.execute("PRAGMA synchronous = FULL")
            schema.create(connection, file)
            # Of the table that everything hangs on only: reading all responses could take minutes.
            found = connection.execute("PRAGMA quick_check(groups)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
        except BaseException:
            connection.close()
            raise
        return connection


def open_for_reading(file: Path) -> sqlite3.Connection:
    """Open read-only; possible at any time, also while the run writes, but then on its machine only.

    Whoever may not write to the directory cannot make the shared memory that goes with a write-ahead log. A ledger
    that was closed has all in its file and needs none: it is then read as one that nobody changes.

    Raises:
        RolloutError: missing, damaged, of another schema, being written on another machine, or not closed, in a
            directory that cannot be written to.
    """
    if not file.is_file():
        raise RolloutError(f"no ledger {file}: the run has reserved no prompts yet, or this is no run directory")
    _refuse_from_elsewhere(file)
    with readable_errors(file):
        try:
            return _opened(file, "mode=ro")
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(_NO_SHARED_MEMORY) or not os.access(file, os.R_OK):
                raise
            wal = file.with_name(file.name + "-wal")
            if wal.exists() and wal.stat().st_size:
                raise RolloutError(
                    f"{file} was not closed, and its directory cannot be written to, as SQLite must to read what is in "
                    f"{wal.name}. Make the directory writable, or copy {file.name} together with {wal.name} into one "
                    "that is"
                ) from error
        return _opened(file, "mode=ro&immutable=1")


def _opened(file: Path, options: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(str(file.absolute()))}?{options}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
    )
    try:
        schema.check(connection, file)
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_from_elsewhere(file: Path) -> None:
    """Refuse to read what a process of another machine writes.

    Reader and writer of a write-ahead log meet in shared memory. Two machines have none, whatever file system they
    share, and a reader would see a state that never was.
    """
    try:
        with file.with_name(file.name + ".lock").open() as lock:
            holder = lock.read().strip()
            host = holder.rpartition(" on ")[2]
            if host in ("", socket.gethostname()):
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return  # whoever held it has ended
            except BlockingIOError:
                pass
    except OSError:
        return  # no lock file, or a file system without locks: nothing tells
    raise RolloutError(
        f"{file}: {holder} writes to it, and a ledger that is being written can be read on the same machine only; run "
        f"this on {host}, or when the run has ended"
    )


@contextlib.contextmanager
def readable_errors(file: Path) -> Iterator[None]:
    """Turn SQLite's errors into one that says what happened to which file and what to do.

    Raises:
        RolloutError: in place of any `sqlite3.Error` but those that are mistakes of the program.
    """
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except sqlite3.Error as error:
        raise RolloutError(f"{file}: {_explained(error)}") from error


def _explained(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    text = str(error)
    if name.startswith("SQLITE_FULL") or "full" in text:
        return (
            f"the ledger cannot grow ({text}). Free disk space and start again: everything up to the last finished "
            "transition is in the ledger, and the run resumes from there"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or type(error) is sqlite3.DatabaseError:
        return (
            f"the ledger is damaged ({text}). Move it aside together with its -wal and -shm files and start again: "
            "the newest checkpoint knows which prompts were in flight, and their responses are drawn anew (steps of "
            "scheduling.rollout_only are in the ledger alone)"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another process has locked the ledger for {_BUSY_SECONDS:.0f} s ({text}); end it and start again"
    return f"the ledger cannot be used ({name or type(error).__name__}: {text})"
