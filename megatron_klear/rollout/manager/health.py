"""Which engines can be trusted with requests: told by the tokens they bring, and not only by a health check."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from megatron_klear.config import SchedulingSettings
from megatron_klear.errors import RolloutError
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.manager.engines import Engine, EnginePool
from megatron_klear.rollout.manager.start_limit import StartLimit

log = logging.getLogger(__name__)

Restart = Callable[[Endpoint, str, StartLimit], Awaitable[Endpoint]]
"""Given a lost engine, why, and the limit that it tells what it waits for: starts the engine anew, loads the current
weights, and returns how to reach it."""

MOST_RESTARTS = 3
"""Restarts in a row, without one whole response in between, after which an engine is given up."""
_FAILURES_IN_A_ROW = 5
"""Failures in a row after which an engine that passes its health check is lost all the same."""
_CHECK_SECONDS = 10.0
_UNANSWERED_CHECKS = 2
"""Checks of an idle engine in a row without an answer, after which it is lost."""
_MOST_DOUBLINGS = 10
"""Of the pause between restarts, which `stall_seconds` bounds, too."""
_SLOW_WINDOWS = 2


class EngineCare:
    """Finds engines that are dead, hung or slow, has them restarted, and lets them in again.

    Dead: a request fails and the health check after it, too; or two checks in a row, when it is idle. Hung: busy and
    without a new token for `scheduling.stall_seconds`, for us or, while others use it, too, for anybody; an engine that
    has not answered since its start may be compiling and gets `scheduling.start_seconds`. Slow:
    `scheduling.slow_factor` times slower per request than the median of the others; it keeps one request, by which it
    can show that it is quick again.

    Args:
        pool: the engines.
        settings: the limits.
        restart: makes a new engine of a lost one; None waits for the old one to answer again.
        on_lost: called with an engine that is to be given up; takes its requests back.
        on_ready: called when an engine can take requests again.
        on_failure: called once when there are too few engines.
        move: takes a request away from an engine; `hung` when it will not answer.
    """

    def __init__(
        self,
        pool: EnginePool,
        settings: SchedulingSettings,
        restart: Restart | None,
        *,
        on_lost: Callable[[Engine], None],
        on_ready: Callable[[], None],
        on_failure: Callable[[RolloutError], None],
        move: Callable[..., None],
    ) -> None:
        self.tick_seconds = min(settings.stall_seconds / 4, 15.0)
        self.version = -1
        self._settled = asyncio.Event()
        self._holds = False
        self._others = 0
        self._shared_since = 0.0
        self._pool, self._settings, self._restart = pool, settings, restart
        self._on_lost, self._on_ready, self._on_failure, self._move = on_lost, on_ready, on_failure, move
        self._short_since: float | None = None
        self._unattended_since = -math.inf  # since when no engine has been starting, where there were too few
        self._measured_at = 0.0
        self._blamed: dict[int, list[Callable[[], None]]] = {}  # what to call when a suspected engine is well
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lost = self.rejoined = 0

    def start(self) -> None:
        """Begin to watch."""
        self._measured_at = asyncio.get_running_loop().time()
        self._spawn(self._watch())

    def stop(self) -> list[asyncio.Task[Any]]:
        """The tasks that are to be cancelled."""
        return list(self._tasks)

    def suspect(self, engine: Engine, *, on_well: Callable[[], None]) -> None:
        """A request failed: ask the engine whether it lives, and send it nothing until it has answered.

        Args:
            engine: that failed.
            on_well: called when it is well, so that the request may be to blame.
        """
        self._blamed.setdefault(engine.number, []).append(on_well)
        if engine.status == "serving":
            engine.failures += 1  # those that fail together, as with one connection, have failed once
            engine.status = "checked"
            self._spawn(self._check(engine))

    def expect_publish(self, *, holding: bool = False) -> None:
        """Engines change their weights from now until `check_versions`: nobody is judged by them meanwhile.

        Args:
            holding: they keep requests in flight, for which they bring no tokens before that.
        """
        self._settled.clear()
        self._holds = holding

    def share(self) -> None:
        """Others use the engines, too, until `unshare`: to bring us no token may only mean that they are served first.

        An engine is hung meanwhile when it brings none to anybody; that it answers nothing at all counts as before.
        """
        if not self._others:
            self._shared_since = asyncio.get_running_loop().time()
        self._others += 1

    def unshare(self) -> None:
        """The engines are ours again; what they did meanwhile is not held against them."""
        self._others -= 1
        self._judge_anew()

    def _judge_anew(self) -> None:
        now = self._measured_at = asyncio.get_running_loop().time()
        for engine in self._pool:
            engine.last_progress, engine.measured_tokens = now, engine.tokens
            for request in engine.requests.values():
                request.last_progress = now

    async def check_versions(self, version: int) -> None:
        """Ask all engines in use which weights they have; those with others than `version` are lost."""
        self.version = version
        if self._holds:
            self._holds = False
            self._judge_anew()
        self._settled.set()
        asked = [engine for engine in self._pool if engine.status in ("serving", "checked")]
        answers = await asyncio.gather(*(self._version_of(engine) for engine in asked), return_exceptions=True)
        for engine, answer in zip(asked, answers, strict=True):
            if isinstance(answer, BaseException):
                self.lose(engine, f"does not answer after a publish: {_text(answer)}")
            elif answer != version:
                self.lose(engine, f"has weights of version {answer} after version {version} was published")

    def lose(self, engine: Engine, why: str) -> None:
        """Give an engine's requests to others, and start it anew where that is possible."""
        if engine.status not in ("serving", "checked"):
            return
        self.lost += 1
        self._blamed.pop(engine.number, None)
        engine.status, engine.last_error = "down", why
        if not engine.restarts:
            engine.last_end = ""  # it has answered since
        log.warning("%s is lost: %s", engine.name, why)
        engine.down_since = asyncio.get_running_loop().time()
        self._on_lost(engine)
        if self._restart is not None:
            self._spawn(self._start_again(engine, self._restart))
        self._judge()

    async def _version_of(self, engine: Engine) -> int:
        return await asyncio.wait_for(engine.endpoint.check(), _CHECK_SECONDS)

    async def _settled_version_of(self, engine: Engine) -> int:
        """As `_version_of`, when no publish changes it meanwhile."""
        while True:
            await self._settled.wait()
            wanted, found = self.version, await self._version_of(engine)
            if self._settled.is_set() and self.version == wanted:
                return found

    async def _check(self, engine: Engine) -> None:
        try:
            await self._version_of(engine)
        except Exception as error:  # whatever its client raises, the engine did not say that it lives
            self.lose(engine, f"{engine.last_error}; then its check failed: {_text(error)}")
            return
        for on_well in self._blamed.pop(engine.number, ()):
            on_well()
        if engine.failures >= _FAILURES_IN_A_ROW:
            self.lose(engine, f"failed {engine.failures} times in a row, the last time: {engine.last_error}")
            return
        if engine.status == "checked":
            engine.status = "serving"
            self._pool.offer(engine)
        self._on_ready()

    async def _start_again(self, engine: Engine, restart: Restart) -> None:
        """Restart until it serves with current weights, or has failed too often.

        One that others start is never given up: waiting costs nothing, and counts as an outage where it is needed.
        """

        def judge_absence(is_absent: bool) -> None:
            engine.status = "down" if is_absent else "starting"

        def note_end(how: str) -> None:
            engine.last_end = how

        while engine.is_of_others or engine.restarts < MOST_RESTARTS:
            engine.restarts += 1
            engine.status = "starting"
            try:
                async with StartLimit(self._settings.start_seconds, judge_absence, note_end) as limit:
                    try:
                        engine.endpoint = await restart(engine.endpoint, engine.last_error, limit)
                    finally:
                        engine.is_of_others |= limit.is_of_others
                found = await self._settled_version_of(engine)
                if found == self.version:
                    self._let_in(engine)
                    return
                engine.last_error = f"came back with weights of version {found} where {self.version} is in use"
            except Exception as error:  # starting an engine is other people's code; it failed, whatever it raised
                late = f"not ready after {self._settings.start_seconds:.0f} s (scheduling.start_seconds)"
                is_late = isinstance(error, TimeoutError) and limit.is_exceeded
                engine.last_error = f"restart {engine.restarts} failed: {late if is_late else _text(error)}"
            engine.status = "down"
            await asyncio.sleep(min(2.0 ** min(engine.restarts, _MOST_DOUBLINGS), self._settings.stall_seconds))
        engine.status = "given up"
        self._judge()

    def _let_in(self, engine: Engine) -> None:
        self.rejoined += 1
        engine.status, engine.has_answered, engine.failures = "serving", False, 0
        engine.unanswered = 0
        engine.slow_windows, engine.is_slow, engine.is_leaving = 0, False, False
        engine.measured_rate = engine.known_rate = None
        engine.last_progress = engine.let_in_at = asyncio.get_running_loop().time()
        log.info("%s serves again, with version %d", engine.name, self.version)
        self._pool.offer(engine)
        self._judge()
        self._on_ready()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.tick_seconds)
            now = asyncio.get_running_loop().time()
            for engine in self._pool:
                self._look_at(engine, now)
            is_ours = not self._others and not self._holds
            if now - self._measured_at >= self._settings.stall_seconds / 2 and is_ours:
                self._measure(now - self._measured_at)
                self._measured_at = now
            self._judge()

    def _look_at(self, engine: Engine, now: float) -> None:
        if engine.status == "down" and self._restart is None:
            self._spawn(self._ask_whether_back(engine))
        if engine.status != "serving":
            return
        if engine.is_leaving and not engine.requests and not self._others and self._settled.is_set():
            engine.slow_restarts += 1
            self.lose(engine, engine.last_error)
        elif self._others and self._hangs_for_all(engine, now):
            return
        elif engine.requests:
            if not (self._others or self._holds):
                self._watch_engine(engine, now)
        elif self._settled.is_set() and not engine.is_asked:
            # Also while others use it: one that is dead must be started anew for them.
            self._spawn(self._check_idle(engine))

    def _hangs_for_all(self, engine: Engine, now: float) -> bool:
        """Whether an engine that others use, too, has brought no token to anybody for too long; it is then lost."""
        silence = engine.endpoint.silence()
        is_first = silence.is_first and not engine.has_answered
        limit = self._settings.start_seconds if is_first else self._settings.stall_seconds
        # What it did before others came, or before it was let in again, is not held against it.
        silent = min(silence.seconds, now - self._shared_since, now - engine.let_in_at)
        if silent <= limit or self._holds:
            return False
        name = "scheduling.start_seconds" if is_first else "scheduling.stall_seconds"
        self.lose(engine, f"brought no token to anybody for {silent:.0f} s ({name})")
        return True

    def _watch_engine(self, engine: Engine, now: float) -> None:
        settings = self._settings
        limit = settings.stall_seconds if engine.has_answered else settings.start_seconds
        silent = now - engine.last_progress
        if silent > limit:
            name = "scheduling.stall_seconds" if engine.has_answered else "scheduling.start_seconds"
            self.lose(engine, f"brought no token for {silent:.0f} s with {engine.outstanding} requests ({name})")
            return
        # One request may be lost in an engine that works for the others; one that waits there for its turn is not.
        for request in list(engine.requests.values()):
            silent = now - request.last_progress
            if not request.tokens:
                if silent > settings.start_seconds:
                    self._move(request, hung=True)
            elif silent > 4 * settings.stall_seconds:
                self._move(request, hung=True)
            elif silent > 3 * settings.stall_seconds:
                # It may have had to make room in a full cache, and the engine then gives its tokens back when asked.
                self._move(request, hung=False)

    def _measure(self, seconds: float) -> None:
        """Tokens per second and request of each engine since the last time, and who lags far behind."""
        for engine in self._pool:
            brought, engine.measured_tokens = engine.tokens - engine.measured_tokens, engine.tokens
            busy = engine.status == "serving" and engine.has_answered and engine.outstanding > 0
            engine.measured_rate = brought / seconds / engine.outstanding if busy else None
            engine.known_rate = engine.known_rate if engine.measured_rate is None else engine.measured_rate
        # Of those that are idle the last one counts: at the end of a step the slow one may be the only one at work.
        rates = {e.number: e.known_rate for e in self._pool if e.known_rate is not None and e.status == "serving"}
        for engine in self._pool:
            rate = engine.measured_rate
            others = [theirs for number, theirs in rates.items() if number != engine.number]
            usual = median(others) if others else 0.0
            if rate is None or usual == 0.0:
                continue
            if rate * self._settings.slow_factor < usual:
                engine.slow_windows += 1
                if engine.slow_windows >= _SLOW_WINDOWS and not engine.is_slow:
                    engine.is_slow = True
                    engine.is_leaving = self._restart is not None and engine.slow_restarts < MOST_RESTARTS
                    engine.last_error = f"{usual / max(rate, 1e-9):.0f} times slower than the median of the others"
                    # What no start mends gets one at a time from now on, which tells when it is quick again.
                    for request in list(engine.requests.values()):
                        self._move(request, hung=False)
            else:
                engine.slow_windows = 0
                if rate * 2 >= usual and not engine.is_leaving:
                    engine.slow_restarts = 0
                if engine.is_slow and not engine.is_leaving and rate * 2 >= usual:
                    engine.is_slow = False
                    self._pool.offer(engine)
                    self._on_ready()

    async def _check_idle(self, engine: Engine) -> None:
        """Find out that an engine without requests has died before it is needed."""
        engine.is_asked = True
        try:
            await self._version_of(engine)
            engine.unanswered = 0
        except Exception as error:  # whatever its client raises, the engine did not say that it lives
            engine.unanswered += 1
            if engine.unanswered >= _UNANSWERED_CHECKS and engine.status == "serving" and not engine.requests:
                self.lose(engine, f"does not answer, idle: {_text(error)}")
        finally:
            engine.is_asked = False

    async def _ask_whether_back(self, engine: Engine) -> None:
        try:
            found = await self._version_of(engine)
        except Exception as error:  # still not there; the next tick asks again
            engine.last_error = engine.last_error or _text(error)
            return
        if engine.status == "down" and found == self.version and self._settled.is_set():
            self._let_in(engine)

    def _judge(self) -> None:
        """End the run when too few engines are left, or have been for too long."""
        settings, now = self._settings, asyncio.get_running_loop().time()
        serving = sum(engine.status in ("serving", "checked") for engine in self._pool)
        coming = sum(engine.status in ("down", "starting") for engine in self._pool)
        starting = any(engine.status == "starting" for engine in self._pool)
        if serving >= settings.min_engines:
            self._short_since = None
            return
        if self._short_since is None:
            self._short_since = now
        if starting:
            self._unattended_since = now
        without = now - max(self._short_since, self._unattended_since)
        if serving + coming < settings.min_engines or without >= settings.outage_seconds:
            self._on_failure(RolloutError(self._account(serving, now - self._short_since)))

    def _account(self, serving: int, waited: float) -> str:
        others = [engine for engine in self._pool if engine.status not in ("serving", "checked")]
        lines = [f"  - {engine.name}: {engine.status}, {_trouble(engine)}" for engine in others[:16]]
        more = [f"  - and {len(others) - 16} more"] if len(others) > 16 else []
        return "\n".join(
            [
                f"{serving} of {len(self._pool.engines)} engines serve, fewer than scheduling.min_engines = "
                f"{self._settings.min_engines}, for {waited:.0f} s. Nothing that was answered is lost: mend the "
                "engines and start again to resume. The others:",
                *lines,
                *more,
            ]
        )

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _trouble(engine: Engine) -> str:
    return engine.last_error + (f"; before that its server {engine.last_end}" if engine.last_end else "")


def _text(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else f"{error or type(error).__name__}"
