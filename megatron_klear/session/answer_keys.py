"""All rows of a run's files, one at a time: do equal questions have equal answer keys, and can every test be used."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from megatron_klear.config import Settings
from megatron_klear.data.jsonl import read_objects
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import PromptRow, prompt_row
from megatron_klear.records import Domain
from megatron_klear.reward import BadTestsError, parse_problem

SHOWN = 3
"""Faults of a kind that are named; of the others only the number."""

Row = tuple[str, PromptRow]
"""A setting that lists files, and a row of one of them."""


class AnswerKeys:
    """What is known of the rows seen so far; questions and ids are kept on disk, so memory does not grow with them.

    Args:
        max_rows: most rows to keep for grading, taken evenly from all.

    Attributes:
        rows, questions, code: how many rows, different questions and rows of domain code were seen.
        domains: of the rows.
        unlike: the first questions with more than one key, as "id, id".
        num_unlike: how many there are.
        unusable: the first code rows whose tests cannot be used, and why.
        num_unusable: how many there are.
    """

    def __init__(self, max_rows: int) -> None:
        self.rows = self.questions = self.code = self.num_unlike = self.num_unusable = 0
        self.domains: set[Domain] = set()
        self.unlike: list[str] = []
        self.unusable: list[str] = []
        self._max_rows, self._step = max_rows, 1
        self._kept: list[Row] = []
        self._directory = tempfile.TemporaryDirectory(prefix="klear-keys-")
        self._table = sqlite3.connect(Path(self._directory.name) / "keys.sqlite", isolation_level=None)
        # A scratch file: nothing of it outlives the process, so nothing needs to reach the disk in order.
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE keys (question BLOB PRIMARY KEY, key BLOB, row TEXT, told INTEGER DEFAULT 0) WITHOUT ROWID"
        )
        self._table.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._directory.cleanup()

    def place_of(self, setting: str, row: PromptRow) -> str:
        """Where the row's id was seen first, which is the row's own place if it is new."""
        key = _digest(f"{setting}\0{row.row_id}")
        self._table.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, row.where))
        return str(self._table.execute("SELECT place FROM ids WHERE id = ?", (key,)).fetchone()[0])

    def add(self, setting: str, row: PromptRow) -> None:
        """Take a row in."""
        if self.rows % self._step == 0:
            self._kept.append((setting, row))
            if len(self._kept) > self._max_rows:
                self._kept, self._step = self._kept[::2], 2 * self._step
        self.rows += 1
        self.domains.add(row.domain)
        self._add_question(row)
        if row.domain == "code":
            self.code += 1
            try:
                parse_problem(row.reference)
            except BadTestsError as error:
                self.num_unusable += 1
                self.unusable += [f"{row.row_id} ({error})"] * (len(self.unusable) < SHOWN)

    def _add_question(self, row: PromptRow) -> None:
        # White space apart: what differs in nothing else is asked alike.
        asked = "\0".join(" ".join(message["content"].split()) for message in row.messages)
        question, key = _digest(asked), _digest(row.reference)
        new = self._table.execute("INSERT OR IGNORE INTO keys VALUES (?, ?, ?, 0)", (question, key, row.row_id))
        if new.rowcount:
            self.questions += 1
            return
        first_key, first, told = self._table.execute(
            "SELECT key, row, told FROM keys WHERE question = ?", (question,)
        ).fetchone()
        if first_key != key and not told:
            self._table.execute("UPDATE keys SET told = 1 WHERE question = ?", (question,))
            self.num_unlike += 1
            self.unlike += [f"{first}, {row.row_id}"] * (len(self.unlike) < SHOWN)

    def sample(self) -> list[Row]:
        """At most `max_rows` rows, evenly from all, in their order."""
        return list(self._kept)


def survey(settings: Settings, keys: AnswerKeys) -> None:
    """Read all rows of `data.prompts` and `data.heldout` into `keys`.

    Raises:
        DataError: naming file and line of everything that is wrong, duplicate ids and an empty data set included.
    """
    for setting, paths in (("data.prompts", settings.data.prompts), ("data.heldout", settings.data.heldout)):
        if not paths and setting == "data.heldout":
            continue
        problems = Problems(f"the files of {setting}")
        before = keys.rows
        for row in _rows(setting, paths, problems, keys):
            keys.add(setting, row)
        if keys.rows == before and not problems:
            problems.add(", ".join(map(str, paths)), f"no rows at all; list a file with rows in {setting}")
        problems.raise_if_any()


def _rows(setting: str, paths: tuple[str, ...], problems: Problems, keys: AnswerKeys) -> Iterator[PromptRow]:
    for where, value in read_objects(paths, problems, setting=setting):
        row = prompt_row(where, value)
        if isinstance(row, list):
            for text in row:
                problems.add(where, text)
            continue
        place = keys.place_of(setting, row)
        if place == where:
            yield row
        else:
            problems.add(where, f"has the id {row.row_id!r} of {place}; ids must be unique")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
