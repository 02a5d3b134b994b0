"""The tables of a ledger, and the check that a file is one that this code can read."""

from __future__ import annotations

import sqlite3
import uuid
from pathlib import Path

from megatron_klear.errors import RolloutError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4B4C5247
"""Marks the file as a rollout ledger ("KLRG")."""

# Blobs have a table of their own: SQLite rewrites a whole row to change one value of it, and grades come later.
_TABLES = """
CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE prompts (
    prompt_id TEXT PRIMARY KEY,
    domain TEXT NOT NULL,
    reference TEXT NOT NULL,
    text TEXT NOT NULL,
    token_ids BLOB NOT NULL
);
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY AUTOINCREMENT,
    epoch INTEGER NOT NULL,
    prompt_id TEXT NOT NULL REFERENCES prompts,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'generated', 'graded', 'committed', 'trained')),
    step INTEGER,
    place INTEGER,
    num_responses INTEGER NOT NULL CHECK (num_responses > 0),
    draws INTEGER NOT NULL DEFAULT 0,
    updated REAL NOT NULL,
    UNIQUE (epoch, prompt_id),
    CHECK ((step IS NOT NULL) = (state IN ('committed', 'trained')))
);
CREATE INDEX groups_of_step ON groups (step, place);
CREATE INDEX groups_in_flight ON groups (group_id) WHERE state != 'trained';
CREATE TABLE responses (
    group_id INTEGER NOT NULL REFERENCES groups,
    response_index INTEGER NOT NULL,
    finish_reason TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    oldest_version INTEGER,
    newest_version INTEGER,
    versions TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    outcome TEXT,
    reward REAL,
    reason TEXT,
    PRIMARY KEY (group_id, response_index)
) WITHOUT ROWID;
CREATE TABLE tokens (
    group_id INTEGER NOT NULL,
    response_index INTEGER NOT NULL,
    token_ids BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    PRIMARY KEY (group_id, response_index)
);
CREATE TABLE events (
    event_id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    event TEXT NOT NULL,
    group_id INTEGER,
    step INTEGER,
    detail TEXT NOT NULL DEFAULT ''
);
"""

TRAINED_NOT_ONCE = """
SELECT g.epoch, g.prompt_id, g.state,
       COALESCE(SUM(e.event = 'trained'), 0) - COALESCE(SUM(e.event = 'rolled back'), 0) AS times
FROM groups g LEFT JOIN events e ON e.group_id = g.group_id
GROUP BY g.group_id
HAVING times != (g.state = 'trained')
"""
"""Groups whose history of training contradicts their state: empty in every ledger that can be trusted.

The events are only ever added to, so this counts what happened and does not merely repeat the state. A group that
was rolled back is one that a checkpoint from before its step was resumed from: the weights that had learned from it
are gone.
"""


def create(connection: sqlite3.Connection, file: Path) -> None:
    """Make the tables in an empty file, or check those of a full one.

    Raises:
        RolloutError: the file is another database, or a ledger of another version of this code.
    """
    if connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
        check(connection, file)
        return
    connection.executescript(
        f"BEGIN IMMEDIATE; {_TABLES} PRAGMA application_id = {APPLICATION_ID}; "
        f"PRAGMA user_version = {SCHEMA_VERSION}; "
        f"INSERT INTO facts VALUES ('ledger_id', '{uuid.uuid4().hex}'); COMMIT;"
    )


def check(connection: sqlite3.Connection, file: Path) -> None:
    """Refuse a file that is no ledger, or one of another schema.

    Raises:
        RolloutError: says what it is and what to do.
    """
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise RolloutError(f"{file} is a SQLite database, but no rollout ledger; move it away or change run.dir")
    if version != SCHEMA_VERSION:
        raise RolloutError(
            f"{file} is a rollout ledger of schema {version}, and this version of megatron_klear reads and writes "
            f"schema {SCHEMA_VERSION}; go on with the version that wrote it, or choose another run.dir"
        )
