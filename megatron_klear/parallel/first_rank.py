"""Work that the first rank does for all, while the others wait without sitting in a collective.

A collective gives up after its time limit, whether the missing rank is dead or merely busy; generation may take hours.
So the others look into the launch's key-value store now and then, and the first rank notes there that it is alive.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_klear import errors
from megatron_klear.errors import ConfigError, KlearError
from megatron_klear.records import ParallelContext

_POLL_SECONDS = (0.02, 0.5)
"""First and longest pause between two looks into the store."""

_ALIVE_SECONDS = 1.0
_READ_SECONDS = 10.0
_Result = TypeVar("_Result")


class FirstRank:
    """Runs actions on rank 0 while the other ranks wait.

    Args:
        context: the layout.
        silence_seconds: how long the first rank may give no sign of life before the others fail.
        beat: called on every rank while it works or waits, several times a second.
        is_asked_to_stop: whether this rank is; the first one learns of it in `is_stop_asked_for`.
    """

    _instances = itertools.count()

    def __init__(
        self,
        context: ParallelContext,
        *,
        silence_seconds: float,
        beat: Callable[[], None] = lambda: None,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rank, self._size = context.world.rank, context.world.size
        self._silence_seconds = silence_seconds
        self._beat, self._is_asked_to_stop = beat, is_asked_to_stop
        self._is_stop_told = False
        self._name = f"klear/first_rank/{next(self._instances)}"  # ranks make theirs in the same order
        self._calls = 0
        self._noted = 0.0

    def run(self, what: str, action: Callable[[], _Result]) -> _Result:
        """Do `action` on rank 0; every rank returns its result when it is done (a collective, of rank 0's duration).

        Args:
            what: names the action in messages, as in "it was to ...".
            action: done on rank 0; it calls `alive` now and then. Its result is sent as JSON, so must be of that kind.

        Raises:
            KlearError: what the action raised, on every rank; or the first rank went silent.
        """
        self._calls += 1
        key = f"{self._name}/{self._calls}"
        if self._rank:
            result: _Result = self._wait(key, what)
            return result
        try:
            result = action()
        except BaseException as error:
            self._tell(key, described(error, "the first rank"))
            self._wait_until_read(key)
            raise
        self._tell(key, {"result": result})
        return result

    def alive(self) -> None:
        """Note that the first rank is alive; called by its actions while they wait for something."""
        self._beat()
        now = time.monotonic()
        if self._size > 1 and self._rank == 0 and now - self._noted > _ALIVE_SECONDS:
            self._noted = now
            _store().set(f"{self._name}/alive", str(now))
            self._is_stop_told = self._is_stop_told or _store().check([f"{self._name}/stop"])

    def is_stop_asked_for(self) -> bool:
        """On the first rank, in an action that calls `alive`: whether any rank is asked to stop."""
        return self._is_stop_told or self._is_asked_to_stop()

    def _tell(self, key: str, outcome: dict[str, object]) -> None:
        if self._size > 1:
            _store().set(key, json.dumps(outcome))

    def _wait_until_read(self, key: str) -> None:
        """Let the others read of a failure before this rank ends, and with it perhaps the store."""
        deadline = time.monotonic() + _READ_SECONDS
        while self._size > 1 and _store().add(f"{key}/read", 0) < self._size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS[0])

    def _wait(self, key: str, what: str) -> Any:
        try:
            outcome = self._outcome(key, what)
        except dist.DistError as error:
            raise errors.RolloutError(f"the first rank ended while it was to {what}") from error
        if "kind" in outcome:
            raise rebuilt(outcome)
        return outcome["result"]

    def _outcome(self, key: str, what: str) -> dict[str, Any]:
        store = _store()
        alive_key, sign = f"{self._name}/alive", b""
        heard, pause = time.monotonic(), _POLL_SECONDS[0]
        while not store.check([key]):
            self._beat()
            if self._is_asked_to_stop() and not self._is_stop_told:
                self._is_stop_told = True
                store.set(f"{self._name}/stop", "1")
            now = store.get(alive_key) if store.check([alive_key]) else b""
            if now != sign:
                sign, heard = now, time.monotonic()
            if time.monotonic() - heard > self._silence_seconds:
                raise errors.RolloutError(
                    f"the first rank gave no sign of life for {self._silence_seconds:.0f} s while it was to {what} "
                    "(parallel.timeout_seconds)"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
        outcome: dict[str, Any] = json.loads(store.get(key))
        if store.add(f"{key}/read", 1) == self._size - 1 and "kind" not in outcome:
            store.delete_key(key)
            store.delete_key(f"{key}/read")
        return outcome


def _store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def described(error: BaseException, who: str) -> dict[str, object]:
    """An error as JSON values, for another process; `who` failed where it is none made for people."""
    if isinstance(error, ConfigError):
        return {"kind": "ConfigError", "problems": list(error.problems)}
    if isinstance(error, KlearError):
        kind = next(c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c)
        return {"kind": kind, "text": str(error)}
    return {"kind": "RolloutError", "text": f"{who} failed: {type(error).__name__}: {error}"}


def rebuilt(outcome: Mapping[str, object]) -> KlearError:
    """The error that another process described."""
    if outcome["kind"] == "ConfigError":
        problems = outcome["problems"]
        assert isinstance(problems, list)
        return ConfigError(problems)
    made: KlearError = getattr(errors, str(outcome["kind"]))(str(outcome["text"]))
    return made
