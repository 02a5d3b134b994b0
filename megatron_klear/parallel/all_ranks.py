"""Work of its own on every rank, and a meeting of all at the end of it without sitting in a collective.

A collective gives up after its time limit, whether a rank is missing or merely busy; how long ranks generate and grade
differs by more than that. So each notes in the launch's key-value store that it is alive or ready, and looks there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_klear.errors import RolloutError
from megatron_klear.records import ParallelContext

_POLL_SECONDS = (0.02, 0.5)
"""First and longest pause between two looks into the store."""

_ALIVE_SECONDS = 1.0
_MOST_NAMED = 8


class AllRanks:
    """Lets ranks wait for one another's work.

    Args:
        context: the layout.
        silence_seconds: how long a rank that others wait for may give no sign of life before they fail.
        beat: called while this rank works or waits, several times a second.
    """

    _instances = itertools.count()

    def __init__(
        self, context: ParallelContext, *, silence_seconds: float, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._rank, self._size = context.world.rank, context.world.size
        self._silence_seconds, self._beat = silence_seconds, beat
        self._name = f"klear/all_ranks/{next(self._instances)}"  # ranks make theirs in the same order
        self._meetings, self._signs, self._noted = 0, 0, 0.0
        self._is_stopping, self._looked = False, 0.0

    def alive(self) -> None:
        """Note that this rank goes on with its work."""
        self._beat()
        if self._size > 1 and time.monotonic() - self._noted > _ALIVE_SECONDS:
            self._note()

    def is_any_asked_to_stop(self, *, asked: bool) -> bool:
        """Whether any rank has said so since the last meeting; others are heard of within about a second.

        Args:
            asked: whether this rank is, which the others then hear of.

        Raises:
            RolloutError: the rank that keeps the store ended.
        """
        if self._size == 1 or self._is_stopping:
            return asked or self._is_stopping
        now = time.monotonic()
        if not asked and now - self._looked < _ALIVE_SECONDS:
            return False
        self._looked = now
        key = f"{self._name}/stop/{self._meetings}"
        try:
            if asked:
                _store().set(key, "")
            self._is_stopping = asked or _store().check([key])
        except dist.DistError as error:
            raise RolloutError("the first rank ended while others were at work") from error
        return self._is_stopping

    def meet(self, what: str) -> None:
        """Return when every rank has come here, however long the last one takes (a collective).

        Args:
            what: names the work before it in messages, as in "it was to ...".

        Raises:
            RolloutError: a rank that is missing went silent, or the one that keeps the store ended.
        """
        self._meetings += 1
        self._is_stopping = False
        if self._size == 1:
            return
        try:
            self._note()
            self._wait(what)
        except dist.DistError as error:
            raise RolloutError(f"the first rank ended while others were to {what}") from error

    def _note(self) -> None:
        self._signs += 1
        self._noted = time.monotonic()
        _store().set(self._key(self._rank), json.dumps([self._meetings, self._signs]))

    def _wait(self, what: str) -> None:
        store = _store()
        missing = {rank: "" for rank in range(self._size) if rank != self._rank}
        heard = dict.fromkeys(missing, time.monotonic())
        pause = _POLL_SECONDS[0]
        while True:
            for rank in list(missing):
                key = self._key(rank)
                sign = store.get(key).decode() if store.check([key]) else ""
                if sign and json.loads(sign)[0] >= self._meetings:
                    del missing[rank]
                elif sign != missing[rank]:
                    missing[rank], heard[rank] = sign, time.monotonic()
            if not missing:
                return
            silent = [rank for rank in missing if time.monotonic() - heard[rank] > self._silence_seconds]
            if silent:
                named = ", ".join(map(str, silent[:_MOST_NAMED])) + (", ..." if len(silent) > _MOST_NAMED else "")
                raise RolloutError(
                    f"rank {named} gave no sign of life for {self._silence_seconds:.0f} s while it was to {what}, and "
                    f"{self._size - len(missing)} of {self._size} ranks wait (parallel.timeout_seconds)"
                )
            self._beat()
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"


def _store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store
