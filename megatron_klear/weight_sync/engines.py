"""What publishing needs of a serving engine; the rollout room offers it, and this room imports nothing of that."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_klear.errors import KlearError, WeightSyncError

log = logging.getLogger(__name__)

_WAKE_SECONDS = 0.5


class Refusal(WeightSyncError):
    """Engines answered, and some of them refused."""


class EngineCaller(Protocol):
    """Sends control requests to one engine."""

    @property
    def name(self) -> str:
        """Names the engine in messages."""
        ...

    @property
    def url(self) -> str:
        """http://HOST:PORT."""
        ...

    def start(
        self, path: str, body: Mapping[str, Any], *, timeout_seconds: float
    ) -> concurrent.futures.Future[tuple[int, str]]:
        """Send a POST with a JSON body at once; the future gives status and text, or raises a KlearError.

        It raises where no answer came, and where the server failed (status 5xx) or was too busy: it may need a restart.

        A body that is `EncodedJson` is sent as it is, whoever else is sent it.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """How engines hold their weights, the same for all of them.

    Attributes:
        tp: tensor parallel size.
        device: `cpu` or `cuda`; decides how checksums are computed.
        dtype: of the weights, as torch names it.
        quantized: whether the weights are changed after they arrive.
    """

    tp: int
    device: str
    dtype: str
    quantized: bool = False


class EngineGroup:
    """All engines that are published to, called together.

    Args:
        callers: one per engine.
        timeout_seconds: of every exchange (weight_sync.timeout_seconds).
        waiting: called while waiting for answers, several times a second.

    Attributes:
        callers: the engines that are left.
        least: how few engines it goes on with when others give no answer; None goes on with all of them only. An engine
            that refuses (status 4xx) is an error in any case; one that fails (5xx) has given no answer.
        on_lost: called with an engine that gave no answer, before it is left out; `leave` waits for it.
        waiting: as above.
    """

    def __init__(
        self, callers: Sequence[EngineCaller], timeout_seconds: float, *, waiting: Callable[[], None] = lambda: None
    ) -> None:
        self.callers = tuple(callers)
        self._changing = threading.Lock()
        self.timeout_seconds = timeout_seconds
        self.least: int | None = None
        self.on_lost: Callable[[EngineCaller], None] = lambda caller: None
        self.waiting = waiting

    def take_in(self, caller: EngineCaller) -> None:
        """Publish to this engine, too, from the next set of weights on."""
        with self._changing:
            self.callers = (*self.callers, caller)

    def leave(self, caller: EngineCaller) -> None:
        """Publish to this engine no more; nothing happens when it is none of them."""
        with self._changing:
            self.callers = tuple(other for other in self.callers if other is not caller)

    def goes_on_without(self, caller: EngineCaller, why: str) -> bool:
        """Whether an engine that gave no answer can be done without; it is left out from then on."""
        with self._changing:
            if caller in self.callers:
                if self.least is None or len(self.callers) - 1 < self.least:
                    return False
                log.warning("%s; publishing goes on with %d engines", why, len(self.callers) - 1)
                self.on_lost(caller)
                self.callers = tuple(other for other in self.callers if other is not caller)
        return True

    def start(
        self, path: str, bodies: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, seconds: float | None = None
    ) -> PendingCalls:
        """Send a request to every engine at once; one body for all, or one for each.

        Args:
            path: of the request.
            bodies: JSON.
            seconds: how long an answer may take, `timeout_seconds` by default.
        """
        callers = self.callers  # once: a server's restart takes it out in a thread of its own
        each = [bodies] * len(callers) if isinstance(bodies, Mapping) else bodies
        futures = [
            caller.start(path, body, timeout_seconds=seconds or self.timeout_seconds)
            for caller, body in zip(callers, each, strict=True)
        ]
        return PendingCalls(self, path, callers, futures)

    def call(
        self, path: str, bodies: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, what: str = "publishing weights"
    ) -> list[Any]:
        """Send a request to every engine and wait for all answers; see `PendingCalls.answers`."""
        return self.start(path, bodies).answers(what=what)

    def try_call(self, path: str, body: Mapping[str, Any]) -> list[Any] | None:
        """As `call`; None when no engine knows the path (status 404)."""
        return self.start(path, body).answers(absent_is_none=True)


class PendingCalls:
    """Requests under way, one per engine."""

    def __init__(
        self,
        group: EngineGroup,
        path: str,
        callers: Sequence[EngineCaller],
        futures: Sequence[concurrent.futures.Future[tuple[int, str]]],
    ) -> None:
        self._group, self._path, self._callers = group, path, callers
        self._futures = futures

    def failures(self) -> list[str]:
        """What went wrong with calls that have ended; waits for none."""
        problems = []
        for caller, future in zip(self._callers, self._futures, strict=True):
            if future.done():
                error = future.exception()
                status, text = (200, "") if error else future.result()
                if error is not None:
                    problems.append(str(error))
                elif status != 200:
                    problems.append(f"{caller.name}: {self._path} answered status {status}: {text}")
        return problems

    def unanswered(self) -> tuple[EngineCaller, ...]:
        """Engines whose call has not ended."""
        return tuple(c for c, future in zip(self._callers, self._futures, strict=True) if not future.done())

    def wait(self, seconds: float) -> None:
        """Wait until all calls have ended, so long at most."""
        deadline = time.monotonic() + seconds
        while concurrent.futures.wait(self._futures, timeout=_WAKE_SECONDS).not_done and time.monotonic() < deadline:
            self._group.waiting()

    def settle(self, seconds: float, *, what: str, has_failed: bool = False) -> list[str]:
        """Wait until all calls have ended, and once one has failed only so long; who gave no answer is left out.

        Args:
            seconds: how long the others have from the first failure on.
            what: as of `answers`.
            has_failed: something else has failed already.

        Returns:
            what those that are left have refused, by name.

        Raises:
            WeightSyncError: an engine gave no answer and cannot be done without.
        """
        deadline = None
        while concurrent.futures.wait(self._futures, timeout=_WAKE_SECONDS).not_done:
            self._group.waiting()
            if deadline is None and (has_failed or self.failures()):
                deadline = time.monotonic() + seconds
            if deadline is not None and time.monotonic() > deadline:
                break
        refused, problems = [], []
        for caller, future in zip(self._callers, self._futures, strict=True):
            try:
                status, text = future.result(0)
            except (KlearError, TimeoutError) as error:
                late = f"{caller.name}: {self._path}: no answer {seconds:.0f} s after the failure"
                why = str(error) if isinstance(error, KlearError) else late
                if not self._group.goes_on_without(caller, why):
                    problems.append(why)
                continue
            if status != 200 and caller in self._group.callers:
                refused.append(f"{caller.name}: {self._path} answered status {status}: {text}")
        if problems:
            raise WeightSyncError(f"{what} failed: " + "; ".join(problems))
        return refused

    def answers(self, *, absent_is_none: bool = False, what: str = "publishing weights") -> Any:
        """The answers as JSON (text where it is none), in the order of the engines that are left.

        Args:
            absent_is_none: return None when no engine knows the path (status 404).
            what: names what they are for, in messages.

        Raises:
            WeightSyncError: an engine refused (`Refusal`, where that is all), or failed and cannot be done without;
                names all that did, and what they said.
        """
        answers: list[Any] = []
        failed: list[str] = []
        problems: list[str] = []
        absent = 0
        while concurrent.futures.wait(self._futures, timeout=_WAKE_SECONDS).not_done:
            self._group.waiting()
        for caller, future in zip(self._callers, self._futures, strict=True):
            try:
                status, text = future.result()
            except KlearError as error:
                if not self._group.goes_on_without(caller, str(error)):
                    failed.append(str(error))
                continue
            if caller not in self._group.callers:
                continue  # it was left out while this was under way
            if status == 404 and absent_is_none:
                absent += 1
            elif status != 200:
                problems.append(f"{caller.name}: {self._path} answered status {status}: {text}")
            answers.append(_parsed(text))
        if absent and absent < len(answers):
            problems.append(f"only some engines know {self._path}; they must all have the same SGLang")
        if failed or problems:
            kind = WeightSyncError if failed else Refusal
            raise kind(f"{what} failed: " + "; ".join([*failed, *problems]))
        return None if absent else answers


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
