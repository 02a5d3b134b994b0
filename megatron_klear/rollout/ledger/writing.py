"""The ledger's writer: each transition in one transaction, safe to repeat, all or nothing."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade, Prompt, Rollout
from megatron_klear.rollout.ledger.database import WriterLock, open_for_writing, readable_errors
from megatron_klear.rollout.ledger.encoding import pack_logprobs, pack_tokens, pack_versions
from megatron_klear.rollout.ledger.entries import EventName, GroupState, StoredGroup
from megatron_klear.rollout.ledger.loading import load_groups


class Ledger:
    """The one writer of a run's ledger; its methods may be called from any thread.

    Every method is one transaction: on return its change is on disk, on an exception nothing of it is. Several
    methods inside one `transaction()` are committed together. Repeating a transition that was already made changes
    nothing; one that does not fit the group's state raises.

    Args:
        file: `run_dir/ledger.sqlite`; made where it is missing.

    Raises:
        RolloutError: another process writes it, it is damaged, of another schema, or cannot be written.
    """

    def __init__(self, file: Path | str) -> None:
        self.file = Path(file)
        try:
            self._lock_file = WriterLock(self.file)
        except OSError as error:
            raise RolloutError(f"{self.file}: the ledger cannot be opened ({error}); see run.dir") from error
        try:
            self.connection = open_for_writing(self.file)
        except BaseException:
            self._lock_file.release()
            raise
        self._mutex = threading.RLock()
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ledger_id(self) -> str:
        """A random name given when the file was made; checkpoints hold it."""
        return self.fact("ledger_id") or ""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit everything done inside together, or nothing of it.

        Raises:
            RolloutError: the database cannot be written; what was committed before is untouched.
        """
        with self._mutex, readable_errors(self.file):
            outermost = self._depth == 0
            if outermost:
                self.connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self.connection
                if outermost:
                    self.connection.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled back already.
                if outermost and self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def reserve(self, prompts: Sequence[tuple[int, Prompt]], *, num_responses: int) -> list[int]:
        """Enter prompt groups that are to be generated; those that are in already keep their place and state.

        Args:
            prompts: (epoch, prompt) in the order of the walk over the data.
            num_responses: M.

        Returns:
            The group ids, in the order of `prompts`.

        Raises:
            RolloutError: a prompt_id that stands for another prompt in this ledger.
        """
        now = time.time()
        ids = []
        with self.transaction() as db:
            for epoch, prompt in prompts:
                tokens = pack_tokens(prompt.token_ids)
                known = db.execute(
                    "SELECT reference, token_ids FROM prompts WHERE prompt_id = ?", [prompt.prompt_id]
                ).fetchone()
                if known is None:
                    entry = (prompt.prompt_id, prompt.domain, prompt.reference, prompt.text, tokens)
                    db.execute("INSERT INTO prompts VALUES (?, ?, ?, ?, ?)", entry)
                elif known != (prompt.reference, tokens):
                    raise RolloutError(
                        f"{self.file}: prompt {prompt.prompt_id} of data.prompts is not the one that this run has "
                        "used under that id; put the data back, or choose another run.dir"
                    )
                found = db.execute(
                    "SELECT group_id FROM groups WHERE epoch = ? AND prompt_id = ?", [epoch, prompt.prompt_id]
                ).fetchone()
                if found is None:
                    cursor = db.execute(
                        "INSERT INTO groups (epoch, prompt_id, state, num_responses, updated) VALUES (?, ?, ?, ?, ?)",
                        (epoch, prompt.prompt_id, "reserved", num_responses, now),
                    )
                    found = (cursor.lastrowid,)
                ids.append(int(found[0]))
        return ids

    def save_response(self, group_id: int, index: int, rollout: Rollout, *, attempts: int = 1) -> bool:
        """Store a response, finished or (finish reason `abort`) as far as it has come.

        Args:
            group_id, index: which response.
            rollout: all tokens so far; replaces what was stored of this response.
            attempts: requests that it took so far.

        Returns:
            Whether the group is now `generated`, all its responses being finished.

        Raises:
            RolloutError: the group is not being generated, or the response was finished with other tokens.
        """
        tokens, logprobs = pack_tokens(rollout.response_ids), pack_logprobs(rollout.rollout_logprobs)
        versions = [version for version, _ in rollout.policy_versions]
        with self.transaction() as db:
            state, needed = self._state(group_id)
            old = db.execute(
                "SELECT r.finish_reason, t.token_ids FROM responses r JOIN tokens t USING (group_id, response_index) "
                "WHERE group_id = ? AND response_index = ?", [group_id, index],
            ).fetchone()  # fmt: skip
            if old is not None and old[0] != "abort":
                if old != (rollout.finish_reason, tokens):
                    raise RolloutError(f"{self.file}: response {index} of group {group_id} was finished differently")
                return state != "reserved"
            if state != "reserved":
                raise RolloutError(f"{self.file}: group {group_id} is {state}; it takes no response {index}")
            db.execute(
                "INSERT OR REPLACE INTO responses (group_id, response_index, finish_reason, num_tokens, "
                "oldest_version, newest_version, versions, attempts) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (group_id, index, rollout.finish_reason, len(rollout.response_ids), min(versions, default=None),
                 max(versions, default=None), pack_versions(rollout.policy_versions), attempts),
            )  # fmt: skip
            db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?)", (group_id, index, tokens, logprobs))
            if rollout.finish_reason == "abort":
                return False
            finished = db.execute(
                "SELECT COUNT(*) FROM responses WHERE group_id = ? AND finish_reason != 'abort'", [group_id]
            ).fetchone()[0]
            if finished == needed:
                self._move(group_id, "generated")
            return bool(finished == needed)

    def save_grades(self, group_id: int, grades: Sequence[Grade]) -> None:
        """Store what the grader says of each response of a generated group.

        Raises:
            RolloutError: the group is not generated, or there is not one grade per response.
        """
        with self.transaction() as db:
            state, needed = self._state(group_id)
            if state not in ("generated", "graded") or len(grades) != needed:
                raise RolloutError(
                    f"{self.file}: group {group_id} is {state} and has {needed} responses; it takes no "
                    f"{len(grades)} grades"
                )
            db.executemany(
                "UPDATE responses SET outcome = ?, reward = ?, reason = ? WHERE group_id = ? AND response_index = ?",
                [(g.outcome, g.reward, g.reason, group_id, index) for index, g in enumerate(grades)],
            )
            self._move(group_id, "graded")

    def commit(self, step: int, group_ids: Sequence[int]) -> None:
        """Promise graded groups to a step, in this order; those that are its already keep their places.

        Raises:
            RolloutError: a group that is not graded, or belongs to another step.
        """
        now = time.time()
        with self.transaction() as db:
            taken = db.execute("SELECT COALESCE(MAX(place), -1) FROM groups WHERE step = ?", [step]).fetchone()[0]
            for group_id in group_ids:
                state, _ = self._state(group_id)
                if state == "graded":
                    taken += 1
                    db.execute(
                        "UPDATE groups SET state = 'committed', step = ?, place = ?, updated = ? WHERE group_id = ?",
                        (step, taken, now, group_id),
                    )
                elif db.execute("SELECT step FROM groups WHERE group_id = ?", [group_id]).fetchone()[0] != step:
                    raise RolloutError(f"{self.file}: group {group_id} is {state}; step {step} cannot have it")

    def trained(self, step: int) -> int:
        """Note that a step has been trained: all groups committed to it are done.

        Returns:
            How many groups this call moved; 0 when it is repeated.
        """
        now = time.time()
        with self.transaction() as db:
            ids = [
                r[0] for r in db.execute("SELECT group_id FROM groups WHERE step = ? AND state = 'committed'", [step])
            ]
            db.executemany(
                "UPDATE groups SET state = 'trained', updated = ? WHERE group_id = ?", [(now, i) for i in ids]
            )
            self.note("trained", ids, step=step)
        return len(ids)

    def replace_responses(self, group_id: int, kept: Mapping[int, Rollout], *, why: str) -> None:
        """Put a group that is not trained back to `reserved`, with these responses left of it.

        Args:
            group_id: which group.
            kept: by response index, finished or heads to be continued.
            why: for the list of events.
        """
        with self.transaction() as db:
            state, _ = self._state(group_id)
            if state == "trained":
                raise RolloutError(f"{self.file}: group {group_id} is trained; its responses are history")
            attempts = dict(
                db.execute("SELECT response_index, attempts FROM responses WHERE group_id = ?", [group_id]).fetchall()
            )
            for table in ("responses", "tokens"):
                db.execute(f"DELETE FROM {table} WHERE group_id = ?", [group_id])
            self._move(group_id, "reserved", draws=1)
            self.note("drawn again", [group_id], detail=why)
            for index, rollout in kept.items():
                self.save_response(group_id, index, rollout, attempts=attempts.get(index, 1))

    def drop_grades(self, group_ids: Sequence[int], *, why: str) -> None:
        """Put groups that are graded or committed back to `generated`, their responses untouched.

        Args:
            group_ids: which groups.
            why: for the list of events.
        """
        with self.transaction() as db:
            for group_id in group_ids:
                state, _ = self._state(group_id)
                if state not in ("graded", "committed"):
                    raise RolloutError(f"{self.file}: group {group_id} is {state}; its grades cannot be dropped")
                db.execute(
                    "UPDATE responses SET outcome = NULL, reward = NULL, reason = NULL WHERE group_id = ?", [group_id]
                )
                self._move(group_id, "generated")
            self.note("graded again", group_ids, detail=why)

    def prune(self, step: int) -> int:
        """Remove the tokens (not the rows) of groups trained in steps up to `step`; their space is used again.

        Returns:
            Responses whose tokens were removed.
        """
        with self.transaction() as db:
            return db.execute(
                "DELETE FROM tokens WHERE group_id IN "
                "(SELECT group_id FROM groups WHERE state = 'trained' AND step <= ?)", [step],
            ).rowcount  # fmt: skip

    def unfinished(self) -> list[int]:
        """Ids of the groups that are not trained, in the order of the walk over the data."""
        return self._ids("SELECT group_id FROM groups WHERE state != 'trained' ORDER BY group_id")

    def of_step(self, step: int) -> list[int]:
        """Ids of the groups that are committed to or trained in a step, in its order."""
        return self._ids("SELECT group_id FROM groups WHERE step = ? ORDER BY place", [step])

    def load(self, group_ids: Iterable[int]) -> list[StoredGroup]:
        """Whole groups, in this order."""
        with self._mutex, readable_errors(self.file):
            return list(load_groups(self.connection, group_ids))

    def states(self) -> dict[str, int]:
        """Number of groups per state."""
        with self._mutex, readable_errors(self.file):
            return dict(self.connection.execute("SELECT state, COUNT(*) FROM groups GROUP BY state").fetchall())

    def fact(self, name: str) -> str | None:
        """A fact noted about the run; None when there is none."""
        with self._mutex, readable_errors(self.file):
            row = self.connection.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, name: str, value: str) -> None:
        """Note a fact about the run."""
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value])

    def note(
        self, event: EventName, group_ids: Iterable[int | None], *, step: int | None = None, detail: str = ""
    ) -> None:
        """Add to the list of events, which nothing ever removes from."""
        now = time.time()
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO events (at, event, group_id, step, detail) VALUES (?, ?, ?, ?, ?)",
                [(now, event, group_id, step, detail) for group_id in group_ids],
            )

    def close(self) -> None:
        """Close the file and let others write; a second call does nothing."""
        with self._mutex:
            self.connection.close()
            self._lock_file.release()

    def _ids(self, query: str, values: Sequence[Any] = ()) -> list[int]:
        with self._mutex, readable_errors(self.file):
            return [int(row[0]) for row in self.connection.execute(query, values)]

    def _state(self, group_id: int) -> tuple[GroupState, int]:
        row = self.connection.execute(
            "SELECT state, num_responses FROM groups WHERE group_id = ?", [group_id]
        ).fetchone()
        if row is None:
            raise RolloutError(f"{self.file}: there is no group {group_id}")
        return row

    def _move(self, group_id: int, state: GroupState, *, draws: int = 0) -> None:
        self.connection.execute(
            "UPDATE groups SET state = ?, step = NULL, place = NULL, draws = draws + ?, updated = ? WHERE group_id = ?",
            (state, draws, time.time(), group_id),
        )
