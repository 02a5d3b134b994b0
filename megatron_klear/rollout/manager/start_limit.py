"""How long the restart of an engine may take."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self


class StartLimit:
    """Time limit around a restart, in which only the engine's own start counts; made and entered in the event loop.

    A server may first have to wait for others: for memory that the trainer has, or for a publish. However long that
    takes, it says nothing of the server.

    Args:
        seconds: of the engine's own start.
        on_absence: called in the event loop with True when a server of others is waited for, which nobody here starts,
            and with False when it is there.
        on_end: called in the event loop with how the engine's process had ended by itself, where that is known.

    Attributes:
        is_of_others: the engine is started by others.
    """

    def __init__(
        self,
        seconds: float,
        on_absence: Callable[[bool], None] = lambda is_absent: None,
        on_end: Callable[[str], None] = lambda how: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(seconds)
        self._left = seconds
        self._is_over = False
        self._on_absence, self._on_end = on_absence, on_end
        self.is_of_others = False

    @property
    def is_exceeded(self) -> bool:
        """Whether the start took longer."""
        return self._timeout.expired()

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        await self._timeout.__aexit__(kind, error, trace)  # raises TimeoutError where it was passed

    @contextlib.contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """While others are waited for: the limit stands still; from any thread, not nested."""
        self._soon(self._hold)
        try:
            yield
        finally:
            self._soon(self._go_on)

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """While a server of others has yet to come: as `waiting_for_others`, and nobody takes it for starting."""
        self.is_of_others = True
        self._soon(lambda: self._tell(is_absent=True))
        with self.waiting_for_others():
            yield
        self._soon(lambda: self._tell(is_absent=False))

    def tell_end(self, how: str) -> None:
        """Tell how the engine's process had ended; from any thread."""
        self._soon(lambda: self._on_end(how))

    def _tell(self, *, is_absent: bool) -> None:
        if self._counts():
            self._on_absence(is_absent)

    def _soon(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the limit with it
            self._loop.call_soon_threadsafe(action)

    def _hold(self) -> None:
        when = self._timeout.when()
        if when is not None and self._counts():
            self._left = when - self._loop.time()
            self._timeout.reschedule(None)

    def _go_on(self) -> None:
        if self._timeout.when() is None and self._counts():
            self._timeout.reschedule(self._loop.time() + self._left)

    def _counts(self) -> bool:
        return not self._is_over and not self._timeout.expired()
