"""When a server last brought a token, for whomever: it tells a request that waits for its turn from one that hangs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from megatron_klear.rollout.endpoint import Silence

_MOST = 10
"""So many times as long a request may wait for its turn; one that a server has forgotten is found out, too."""


class Progress:
    """Of one server, over all requests at it, from whatever thread they are sent."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._lock = threading.Lock()
        self._waiting = 0
        self._silent_since: float | None = None

    def silence(self) -> Silence:
        """How long the server has brought no token; from any thread."""
        since = self._silent_since
        seconds = 0.0 if since is None else time.monotonic() - since
        return Silence(seconds=seconds, is_first=self._last == -math.inf)

    @asynccontextmanager
    async def limit(self, idle_seconds: float, first_seconds: float = 0.0) -> AsyncIterator[Callable[[], None]]:
        """Give a request up that brings no token for so long.

        It may be waiting for its turn behind long responses: before its first token, or later, when the server's
        cache was full and it had to make room. So it is given up only when the server brings no token for others
        either, or after ten times as long.

        Args:
            idle_seconds: longest time without a token.
            first_seconds: longest time until the server's first of all; it may be compiling.

        Yields:
            what is to be called when the request has brought tokens.

        Raises:
            TimeoutError: on the way out.
        """
        own = time.monotonic()
        with self._lock:
            self._waiting += 1
            if self._silent_since is None:
                self._silent_since = own

        def brought() -> None:
            nonlocal own
            with self._lock:
                own = self._last = self._silent_since = time.monotonic()

        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            handle: asyncio.TimerHandle

            def look() -> None:
                nonlocal handle
                of_others = min(self._last, own + (_MOST - 1) * idle_seconds)
                seconds = max(idle_seconds, first_seconds) if self._last == -math.inf else idle_seconds
                left = max(own, of_others) + seconds - time.monotonic()
                if left > 0:
                    handle = loop.call_later(left, look)
                else:
                    limit.reschedule(loop.time())

            handle = loop.call_later(idle_seconds, look)
            try:
                yield brought
            finally:
                handle.cancel()
                with self._lock:
                    self._waiting -= 1
                    # A server at which everybody has given up has not answered by that.
                    if not self._waiting and self.silence().seconds < idle_seconds:
                        self._silent_since = None
