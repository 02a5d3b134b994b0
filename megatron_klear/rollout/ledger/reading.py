"""Questions to a ledger, also while its run goes on: which groups, which responses, and how they ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_klear.rollout.ledger.database import open_for_reading, readable_errors
from megatron_klear.rollout.ledger.encoding import unpack_versions
from megatron_klear.rollout.ledger.entries import StoredGroup
from megatron_klear.rollout.ledger.filter import GroupFilter, id_pattern
from megatron_klear.rollout.ledger.loading import load_groups
from megatron_klear.rollout.ledger.schema import TRAINED_NOT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """A line about a group; counts and means are over the responses that the filter lets through.

    Attributes:
        group_id, epoch, prompt_id, state, step, draws: see `StoredGroup`.
        finished: finished responses.
        num_responses: M.
        correct: correct ones.
        reward: mean over the graded; None without any.
        tokens: mean length.
        oldest_version, newest_version: over all tokens.
    """

    group_id: int
    epoch: int
    prompt_id: str
    state: str
    step: int | None
    draws: int
    finished: int
    num_responses: int
    correct: int
    reward: float | None
    tokens: float | None
    oldest_version: int | None
    newest_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRow:
    """A line about a response.

    Attributes:
        group_id, epoch, prompt_id, state, step: of its group.
        response_index: 0 to M-1.
        finish_reason: `abort` while it is unfinished.
        num_tokens: so far.
        versions: (version, tokens) runs.
        attempts: requests that it took.
        outcome, reward, reason: its grade; None before.
    """

    group_id: int
    epoch: int
    prompt_id: str
    state: str
    step: int | None
    response_index: int
    finish_reason: str
    num_tokens: int
    versions: tuple[tuple[int, int], ...]
    attempts: int
    outcome: str | None
    reward: float | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """A line of the history; what was noted of several groups in one go is one line.

    Attributes:
        at: seconds since 1970.
        event: what happened.
        step: that it concerns, if any.
        detail: why, in words.
        groups: how many groups it was noted of; 0 for the run as a whole.
        prompt_id, epoch: of the group, where it is one and still there.
    """

    at: float
    event: str
    step: int | None
    detail: str
    groups: int
    prompt_id: str | None
    epoch: int | None


_GROUP_ROWS = """
SELECT g.group_id, g.epoch, g.prompt_id, g.state, g.step, g.draws,
       COUNT(r.response_index) - COALESCE(SUM(r.finish_reason = 'abort'), 0) AS finished, g.num_responses,
       COALESCE(SUM(r.outcome = 'correct'), 0) AS correct,
       AVG(CASE WHEN r.outcome != 'ungraded' THEN r.reward END) AS reward, AVG(r.num_tokens) AS tokens,
       MIN(r.oldest_version) AS oldest_version, MAX(r.newest_version) AS newest_version
FROM groups g LEFT JOIN responses r USING (group_id)
WHERE {where} GROUP BY g.group_id ORDER BY g.group_id DESC LIMIT {limit}
"""
_RESPONSE_ROWS = """
SELECT g.group_id, g.epoch, g.prompt_id, g.state, g.step, r.response_index, r.finish_reason, r.num_tokens, r.versions,
       r.attempts, r.outcome, r.reward, r.reason
FROM groups g JOIN responses r USING (group_id)
WHERE {where} ORDER BY g.group_id {direction}, r.response_index LIMIT {limit}
"""
# What is noted in one go has one time.
_EVENT_ROWS = """
SELECT e.at, e.event, e.step, e.detail, COUNT(e.group_id) AS of_groups,
       CASE WHEN COUNT(e.group_id) = 1 THEN MIN(g.prompt_id) END, CASE WHEN COUNT(e.group_id) = 1 THEN MIN(g.epoch) END
FROM events e LEFT JOIN groups g USING (group_id)
WHERE (?1 IS NULL OR g.prompt_id GLOB ?1) AND (?2 IS NULL OR e.event = ?2)
GROUP BY e.at, e.event, e.step, e.detail ORDER BY MAX(e.event_id) DESC LIMIT {limit}
"""


class LedgerReader:
    """Reads a ledger without disturbing the run that writes it.

    Args:
        file: `run_dir/ledger.sqlite`.

    Raises:
        RolloutError: missing, damaged, or of another schema.
    """

    def __init__(self, file: Path | str) -> None:
        self.file = Path(file)
        self._connection = open_for_reading(self.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment, that of the first read, whatever is written meanwhile.

        The write-ahead log grows until it ends: nothing that waits for a person belongs inside.
        """
        with readable_errors(self.file):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.rollback()

    def fact(self, name: str) -> str | None:
        """A fact noted about the run; None when there is none."""
        rows = list(self._rows("SELECT value FROM facts WHERE name = ?", [name]))
        return str(rows[0][0]) if rows else None

    def states(self) -> dict[str, int]:
        """Number of groups per state."""
        return dict(self._rows("SELECT state, COUNT(*) FROM groups GROUP BY state"))

    def steps(self, state: str | None = None) -> list[int]:
        """Steps that have groups, or groups in this state, going up."""
        query = "SELECT DISTINCT step FROM groups WHERE step IS NOT NULL AND (?1 IS NULL OR state = ?1) ORDER BY step"
        return [row[0] for row in self._rows(query, [state])]

    def group_rows(self, chosen: GroupFilter, limit: int = -1) -> list[GroupRow]:
        """Groups with a response that the filter lets through, newest first; a negative limit gives all."""
        where, values = chosen.where()
        names = GroupRow.__dataclass_fields__
        rows = self._rows(_GROUP_ROWS.format(where=where, limit=int(limit)), values)
        return [GroupRow(**dict(zip(names, row, strict=True))) for row in rows]

    def response_rows(
        self, chosen: GroupFilter, limit: int = -1, *, newest_first: bool = False
    ) -> Iterator[ResponseRow]:
        """Responses that the filter lets through, in order of group and index, or the newest groups first."""
        where, values = chosen.where()
        names = ResponseRow.__dataclass_fields__
        query = _RESPONSE_ROWS.format(where=where, limit=int(limit), direction="DESC" if newest_first else "ASC")
        for row in self._rows(query, values):
            fields = dict(zip(names, row, strict=True))
            yield ResponseRow(**{**fields, "versions": unpack_versions(fields["versions"])})

    def load(self, group_id: int) -> StoredGroup | None:
        """One whole group; None when there is none of that id."""
        with readable_errors(self.file):
            return next(load_groups(self._connection, [group_id]), None)

    def groups_of_step(self, step: int) -> list[StoredGroup]:
        """Whole groups of a step, in its order."""
        ids = [row[0] for row in self._rows("SELECT group_id FROM groups WHERE step = ? ORDER BY place", [step])]
        with readable_errors(self.file):
            return list(load_groups(self._connection, ids))

    def trained_not_once(self) -> list[tuple[int, str, str, int]]:
        """(epoch, prompt_id, state, times trained) of groups whose history contradicts their state; must be empty."""
        return self._rows(TRAINED_NOT_ONCE)

    def events(self) -> list[tuple[float, str, int | None, int | None, str]]:
        """(time, event, group_id, step, detail) of all that was noted, oldest first."""
        return self._rows("SELECT at, event, group_id, step, detail FROM events ORDER BY event_id")

    def event_rows(self, prompt_id: str | None = None, event: str | None = None, limit: int = -1) -> list[EventRow]:
        """The history, newest first; a negative limit gives all of it.

        Args:
            prompt_id: only of this prompt; `%` stands for any text.
            event: only this event.
            limit: most lines.
        """
        values = [None if prompt_id is None else id_pattern(prompt_id), event]
        return [
            EventRow(**dict(zip(EventRow.__dataclass_fields__, row, strict=True)))
            for row in self._rows(_EVENT_ROWS.format(limit=int(limit)), values)
        ]

    def _rows(self, query: str, values: list[Any] | None = None) -> list[Any]:
        with readable_errors(self.file):
            return self._connection.execute(query, values or []).fetchall()
