"""Keeps servers from starting while the trainer has the memory of the GPUs that both use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WAKE_SECONDS = 0.2


class Turn:
    """Whose turn it is, on the first rank: the trainer's at first.

    A server that starts takes what memory it finds, so it may do so in the engines' turn only, and that lasts until it
    has started.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_trainers = True
        self._is_urgent = False
        self._starting = 0

    @property
    def is_urgent(self) -> bool:
        """Whether servers that are starting are to give up: the trainer cannot wait for them."""
        return self._is_urgent

    def take(self, waiting: Callable[[], None], is_urgent: Callable[[], bool] = lambda: False) -> None:
        """Begin the trainer's turn when no server is starting.

        Args:
            waiting: called while it waits, several times a second; may raise.
            is_urgent: asked as often.
        """
        with self._changed:
            try:
                while self._starting:
                    self._is_urgent = is_urgent()
                    self._changed.wait(_WAKE_SECONDS)
                    waiting()
            finally:
                self._is_urgent = False
            self._is_trainers = True

    def give(self) -> None:
        """Begin the engines' turn."""
        with self._changed:
            self._is_trainers = False
            self._changed.notify_all()

    @contextmanager
    def starting(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Around the start of a server: waits for the engines' turn, which then does not end.

        Args:
            waiting: as of `take`.
        """
        with self._changed:
            while self._is_trainers:
                self._changed.wait(_WAKE_SECONDS)
                waiting()
            self._starting += 1
        try:
            yield
        finally:
            with self._changed:
                self._starting -= 1
                self._changed.notify_all()
