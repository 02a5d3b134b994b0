"""Writes of many requests to the ledger, gathered into few transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from megatron_klear.rollout.ledger import Ledger

T = TypeVar("T")
Operation = Callable[[Ledger], Any]
RunBlocking = Callable[..., Awaitable[Any]]
"""Runs a blocking function with arguments outside the event loop: `asyncio.to_thread`, or at once in a simulation."""


class Journal:
    """Applies operations to the ledger in the order they were added; whatever waits is committed together.

    A commit costs one sync of the disk, however many responses it holds. While one is under way the next gathers, so
    the loop never waits for the disk and the disk never waits for the loop.

    Args:
        ledger: where to.
        run_blocking: keeps the disk out of the event loop.
        on_error: called once with what went wrong; all operations that wait get it too.
    """

    def __init__(self, ledger: Ledger, run_blocking: RunBlocking, on_error: Callable[[BaseException], None]) -> None:
        self._ledger = ledger
        self._run_blocking = run_blocking
        self._on_error = on_error
        self._pending: list[tuple[Operation, asyncio.Future[Any]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self.commits = 0
        self.operations = 0

    def add(self, operation: Operation) -> asyncio.Future[Any]:
        """Queue an operation; the future gets its result once it is on disk."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # An error is reported through on_error; nobody has to wait for the future.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._pending.append((operation, future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        return future

    async def flushed(self) -> None:
        """Wait until everything added so far is on disk."""
        while self._flusher is not None:
            await asyncio.shield(self._flusher)

    async def _flush(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, []
                try:
                    results = await self._run_blocking(self._apply, [operation for operation, _ in batch])
                except Exception as error:  # told to everyone who waits, and to the owner
                    failed, self._pending = batch + self._pending, []
                    for _, future in failed:
                        if not future.done():
                            future.set_exception(error)
                    self._on_error(error)
                    return
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        finally:
            self._flusher = None

    def _apply(self, operations: list[Operation]) -> list[Any]:
        self.commits += 1
        self.operations += len(operations)
        with self._ledger.transaction():
            return [operation(self._ledger) for operation in operations]
