"""How busy engines are: means over time, to choose `scheduling.in_flight`, staleness and the number of engines by."""

from __future__ import annotations

import math
from collections.abc import Callable


class Load:
    """Integrates what is in flight over time, from one `take` to the next; the first one begins.

    Args:
        now: the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began = self._changed = math.nan
        self._flying = self._busy = 0
        self._flying_seconds = self._busy_seconds = 0.0
        self._tokens = 0

    def sent(self, *, first_of_engine: bool) -> None:
        """A request is in flight; its engine had none before, or had."""
        self._account()
        self._flying += 1
        self._busy += first_of_engine

    def ended(self, *, last_of_engine: bool) -> None:
        """A request is in flight no more; its engine has none left, or has."""
        self._account()
        self._flying -= 1
        self._busy -= last_of_engine

    def brought(self, tokens: int) -> None:
        """Tokens of an answer that is kept."""
        self._tokens += tokens

    def take(self) -> tuple[float, float, float]:
        """Mean requests in flight, mean engines with any, and tokens per second, since this was last asked."""
        self._account()
        seconds = self._changed - self._began
        parts = (self._flying_seconds, self._busy_seconds, float(self._tokens))
        found = tuple(part / seconds for part in parts) if seconds > 0 else (0.0, 0.0, 0.0)
        self._began, self._flying_seconds, self._busy_seconds, self._tokens = self._changed, 0.0, 0.0, 0
        return found[0], found[1], found[2]

    def _account(self) -> None:
        now = self._now()
        passed, self._changed = now - self._changed, now
        if math.isnan(passed):
            return
        self._flying_seconds += passed * self._flying
        self._busy_seconds += passed * self._busy
