"""The manager for a trainer that is not asynchronous: a thread with an event loop, and calls that wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from megatron_klear.config import SchedulingSettings
from megatron_klear.errors import RolloutError
from megatron_klear.observe import names
from megatron_klear.records import Prompt
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.ledger import Ledger, StoredGroup
from megatron_klear.rollout.manager.dispatch import Sampling
from megatron_klear.rollout.manager.grading import Grader
from megatron_klear.rollout.manager.health import Restart
from megatron_klear.rollout.manager.scheduler import Scheduler

T = TypeVar("T")

_CLOSE_SECONDS = 8.0
"""For engines to be told that nobody waits any more; a run that was asked to stop has half a minute in all."""
_JOIN_SECONDS = 2.0
_COUNTED = {
    names.REQUESTS_SENT: "requests",
    names.REQUESTS_FAILED: "failed requests",
    names.REQUESTS_MALFORMED: "malformed answers",
    names.REQUESTS_ABANDONED: "abandoned requests",
    names.REQUESTS_MOVED: "moved requests",
    names.REQUESTS_INTERRUPTED: "interrupted",
}
"""Keys of the dispatcher's counts by the names of metrics."""


class RolloutManager:
    """Draws, grades and hands out prompt groups over any number of engines, in a thread of the first rank.

    A step goes `submit` (as far ahead as staleness allows, see `steps_ahead`), `take` until it gives groups, the
    updates, `trained`, `pause_for_publish`, the publish itself, `resume`. Every call raises the error that ended
    generation, once there is one.

    Args:
        endpoints: the engines, all with weights of `version`; it closes them.
        ledger: reconciled with the checkpoint; stays open when the manager closes.
        settings: mode, staleness, order, limits.
        sampling: what is drawn.
        groups_per_step: rl.prompts_per_step.
        grade: judges finished groups, in a thread of its own.
        version: of the engines' weights.
        next_step: first step to train.
        restart: makes a new engine of a lost one; None waits for the old one to come back.
        holds_in_flight: whether a publish leaves requests in flight in the engines (weight_sync.pause_mode).

    Raises:
        RolloutError: there are fewer engines than `scheduling.min_engines`.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        ledger: Ledger,
        *,
        settings: SchedulingSettings,
        sampling: Sampling,
        groups_per_step: int,
        grade: Grader,
        version: int,
        next_step: int,
        restart: Restart | None = None,
        holds_in_flight: bool = False,
    ) -> None:
        if len(endpoints) < settings.min_engines:
            raise RolloutError(
                f"{len(endpoints)} engines were given, fewer than scheduling.min_engines = {settings.min_engines}"
            )
        self._ledger = ledger
        self._num_responses, self._keep_steps = sampling.num_responses, settings.keep_steps
        self._pausing: concurrent.futures.Future[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="rollout manager", daemon=True)
        self._thread.start()
        self._scheduler: Scheduler = self._call(
            self._made(
                lambda: Scheduler(
                    endpoints,
                    ledger,
                    settings=settings,
                    sampling=sampling,
                    groups_per_step=groups_per_step,
                    grade=grade,
                    restart=restart,
                    holds_in_flight=holds_in_flight,
                )
            )
        )
        self.steps_ahead = self._scheduler.staleness
        """Steps beyond the one being taken whose prompts should be submitted, so that no engine waits for prompts."""
        self._call(self._scheduler.start(version=version, next_step=next_step))
        self._call(self._scheduler.resume(version))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, prompts: Sequence[tuple[int, Prompt]]) -> None:
        """Reserve (epoch, prompt) groups in the ledger, in this order, and draw them when their time has come.

        Repeating it for prompts that were submitted before, also in an earlier life of the run, changes nothing.
        """
        self._scheduler.raise_error()
        group_ids = self._ledger.reserve(prompts, num_responses=self._num_responses)
        self._call(self._made(lambda: self._scheduler.add(group_ids)))

    def take(self, step: int, count: int, timeout: float) -> list[StoredGroup] | None:
        """The groups of a step, committed to it in the ledger; None when they are not there within `timeout`.

        Asked again for the same step, it gives the same groups in the same order.

        Args:
            step: to train, counted from 1.
            count: groups that it needs.
            timeout: in seconds; short, so that other ranks never wait long for the first.

        Raises:
            RolloutError: generation cannot go on.
        """
        return self._call(self._scheduler.take(step, count, timeout))

    def num_ready(self, step: int) -> int:
        """Groups that are generated and graded and no other step's; there may be more than the step needs."""
        return self._call(self._made(lambda: self._scheduler.num_ready(step)))

    def trained(self, step: int, *, saved_step: int) -> None:
        """Note that a step has been trained: durable on return, so call it before the checkpoint.

        Args:
            step: counted from 1.
            saved_step: of the newest checkpoint; later steps may have to be trained again, and keep their tokens.
        """
        self._ledger.trained(step)
        if self._keep_steps:
            self._ledger.prune(min(step - self._keep_steps, saved_step))
        self._call(self._made(lambda: self._scheduler.trained(step)))

    def pause_for_publish(self, timeout: float | None = None) -> bool:
        """Wait until no request is in flight: by interrupting them (partial rollouts) or by waiting for them.

        Where engines hold requests during a publish, those stay in flight, and there is nothing to wait for.

        Nothing is sent from the first call on. Asked again after one that timed out, it goes on waiting.

        Args:
            timeout: in seconds; short, so that other ranks never wait long for the first. None waits for the end.

        Returns:
            whether none is in flight now.
        """
        if self._pausing is None:
            self._pausing = asyncio.run_coroutine_threadsafe(self._scheduler.pause(), self._loop)
        if not concurrent.futures.wait([self._pausing], timeout=timeout).done:
            return False
        done, self._pausing = self._pausing, None
        done.result()
        return True

    def resume(self, version: int) -> None:
        """Go on under new weights; engines that report another version are lost until they have it."""
        self._call(self._scheduler.resume(version))

    @contextmanager
    def sharing_engines(self) -> Iterator[None]:
        """Around requests that others send to the engines; no engine is given up for its silence meanwhile."""
        care = self._scheduler.dispatcher.care
        self._call(self._made(care.share))
        try:
            yield
        finally:
            self._call(self._made(care.unshare))

    def counts(self) -> dict[str, float]:
        """What happened since the manager was made, under names of `observe.names`, and how many engines serve now."""
        return self._call(self._made(self._counted))

    def take_load(self) -> dict[str, float]:
        """How busy the engines were since this was last asked, under names of `observe.names`."""
        flying, busy, tokens = self._call(self._made(self._scheduler.dispatcher.load.take))
        return {
            names.REQUESTS_IN_FLIGHT: flying,
            names.ENGINES_BUSY: busy,
            names.ENGINES_TOKENS_PER_SECOND: tokens,
        }

    def _counted(self) -> dict[str, float]:
        dispatcher = self._scheduler.dispatcher
        pool, care = dispatcher.pool, dispatcher.care
        found = {name: float(dispatcher.counts[key]) for name, key in _COUNTED.items()}
        return found | {
            names.REQUESTS_GROUPS_REDRAWN: float(self._scheduler.drawn_again),
            names.ENGINES_SERVING: float(len(pool.serving())),
            names.ENGINES_LOST: float(care.lost),
            names.ENGINES_REJOINED: float(care.rejoined),
        }

    def close(self) -> None:
        """End the thread and its requests; a second call does nothing."""
        if not self._thread.is_alive():
            return
        if self._pausing is not None:
            self._pausing.cancel()
        try:
            asyncio.run_coroutine_threadsafe(self._scheduler.close(), self._loop).result(_CLOSE_SECONDS)
        except TimeoutError:
            pass  # an engine's client that cannot be ended must not keep the run from ending
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_JOIN_SECONDS)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @staticmethod
    async def _made(make: Callable[[], T]) -> T:
        return make()
