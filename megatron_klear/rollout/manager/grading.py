"""Groups whose responses are all there, on their way through the grader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade, RolloutGroup
from megatron_klear.rollout.ledger import Ledger
from megatron_klear.rollout.manager.journal import Journal, RunBlocking

Grader = Callable[[Sequence[RolloutGroup]], Sequence[Sequence[Grade]]]
"""Grades whole groups, one grade per response; blocking, called outside the event loop by two callers at a time."""

_TOGETHER = 32
_AT_A_TIME = 2
"""While one call waits for its slowest response, the graders have those of the other."""


class GradingQueue:
    """Grades groups, begun in the order they became complete, a few at a time, while others are being generated.

    Args:
        ledger: responses are read from it, so that complete groups need no memory here.
        journal: grades go through it.
        grade: the grader.
        run_blocking: keeps grader and disk out of the event loop.
        on_graded: called with a group's id once its grades are on disk.
        on_failure: called when grading cannot go on.
    """

    def __init__(
        self,
        ledger: Ledger,
        journal: Journal,
        grade: Grader,
        run_blocking: RunBlocking,
        *,
        on_graded: Callable[[int], None],
        on_failure: Callable[[RolloutError], None],
    ) -> None:
        self._ledger, self._journal, self._grade, self._run_blocking = ledger, journal, grade, run_blocking
        self._on_graded, self._on_failure = on_graded, on_failure
        self._waiting: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_working = 0
        self._is_closed = False

    def add(self, group_id: int) -> None:
        """Grade a group that the ledger has as generated."""
        self._waiting.append(group_id)
        if self._num_working < _AT_A_TIME and not self._is_closed:
            self._num_working += 1
            task = asyncio.create_task(self._grade_all())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop; groups without grades stay generated in the ledger and are graded in the next life."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _grade_all(self) -> None:
        try:
            while self._waiting:
                ids, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
                grades = await self._run_blocking(self._grades_of, ids)
                await asyncio.gather(*(self._save(i, g) for i, g in zip(ids, grades, strict=True)))
                for group_id in ids:
                    self._on_graded(group_id)
        except RolloutError as error:
            self._on_failure(error)
        except Exception as error:  # the grader is code of another room; what it raises ends the run in its words
            self._on_failure(RolloutError(f"grading failed: {type(error).__name__}: {error}"))
        finally:
            self._num_working -= 1

    def _grades_of(self, group_ids: list[int]) -> Sequence[Sequence[Grade]]:
        return self._grade([stored.rollout_group() for stored in self._ledger.load(group_ids)])

    def _save(self, group_id: int, grades: Sequence[Grade]) -> asyncio.Future[None]:
        return self._journal.add(lambda ledger: ledger.save_grades(group_id, grades))
