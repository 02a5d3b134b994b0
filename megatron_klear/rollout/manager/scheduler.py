"""The asynchronous core of the manager: which groups may be started, and when a step has its groups."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

from megatron_klear.config import SchedulingSettings
from megatron_klear.errors import RolloutError
from megatron_klear.records import Rollout
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.ledger import Ledger, StoredGroup
from megatron_klear.rollout.manager.answers import cut_to_length
from megatron_klear.rollout.manager.dispatch import Dispatcher, Sampling
from megatron_klear.rollout.manager.grading import Grader, GradingQueue
from megatron_klear.rollout.manager.health import Restart
from megatron_klear.rollout.manager.journal import Journal, RunBlocking
from megatron_klear.rollout.manager.order import completion_batch, fixed_batch, started_limit
from megatron_klear.rollout.manager.work import GroupWork, ResponseWork


class Scheduler:
    """Draws the responses of reserved groups on any number of engines, has them graded, and hands out steps.

    All methods belong to one event loop; `RolloutManager` is the same for a trainer that is not asynchronous.

    Args:
        endpoints: the engines, all with weights of the version that `start` is told.
        ledger: the truth about every group.
        settings: mode, staleness, order, limits.
        sampling: what is drawn.
        groups_per_step: rl.prompts_per_step.
        grade: judges finished groups.
        restart: makes a new engine of a lost one, with current weights; None waits for the old one to come back.
        holds_in_flight: whether a publish leaves requests in flight in the engines, which go on with them under the new
            weights (async mode with partial rollouts; weight_sync.pause_mode).
        run_blocking: keeps disk and grader out of the loop.
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
        restart: Restart | None = None,
        holds_in_flight: bool = False,
        run_blocking: RunBlocking = asyncio.to_thread,
    ) -> None:
        self._interrupts = settings.mode == "async" and settings.partial_rollouts
        self._holds_in_flight = self._interrupts and holds_in_flight
        self.staleness = settings.staleness
        self.error: RolloutError | None = None
        self.drawn_again = 0
        self._settings, self._ledger, self._run_blocking = settings, ledger, run_blocking
        self._per_step = groups_per_step
        self._journal = Journal(ledger, run_blocking, self._failed_to_write)
        self._grading = GradingQueue(
            ledger, self._journal, grade, run_blocking, on_graded=self._graded, on_failure=self.fail
        )
        self.dispatcher = Dispatcher(
            list(endpoints), settings, sampling, restart,
            on_part=self._save, on_idle=self._tell, on_failure=self.fail,
        )  # fmt: skip
        self._groups: dict[int, GroupWork] = {}
        self._not_started: list[int] = []
        self._num_started = self._num_graded = 0
        self._next_step = 1
        self._ready_ranks = itertools.count()
        self._news = asyncio.Event()

    async def start(self, *, version: int, next_step: int) -> None:
        """Take over what the ledger has in flight; nothing is sent before `resume`.

        Args:
            version: of the weights that the engines have.
            next_step: first step to train.
        """
        self.dispatcher.version, self._next_step = version, next_step
        for group_id in self._ledger.unfinished():
            self._add(self._ledger.load([group_id])[0])
        self.dispatcher.load.take()
        self.dispatcher.care.start()

    def add(self, group_ids: Sequence[int]) -> None:
        """Draw these reserved groups, too; those it has already are left as they are."""
        for stored in self._ledger.load([i for i in group_ids if i not in self._groups]):
            if stored.state != "trained":
                self._add(stored)
        self._go_on()

    async def take(self, step: int, count: int, timeout: float | None = None) -> list[StoredGroup] | None:
        """The groups of a step, committed to it; None when they are not there in time.

        Asked again for the same step it gives the same groups.

        Raises:
            RolloutError: generation cannot go on, or nothing that is under way can fill the step.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            self.raise_error()
            self._news.clear()
            batch = await self._batch(step, count)
            if batch is not None:
                break
            in_time = True
            try:
                await asyncio.wait_for(
                    self._news.wait(), None if deadline is None else max(0.0, deadline - loop.time())
                )
            except TimeoutError:
                in_time = False
            if not in_time:
                if await self._batch(step, count) is None:
                    self._refuse_to_wait_in_vain(step, count)
                return None
        ids = [group.group_id for group in batch]
        for group in batch:
            group.step = step
        await self._journal.add(lambda ledger: ledger.commit(step, ids))
        stored: list[StoredGroup] = await self._run_blocking(self._ledger.load, ids)
        return stored

    def num_ready(self, step: int) -> int:
        """Groups that are generated and graded, and no other step's."""
        return sum(group.is_graded and group.step in (None, step) for group in self._groups.values())

    def trained(self, step: int) -> None:
        """Forget the groups of a step that the ledger has as trained."""
        for group in [g for g in self._groups.values() if g.step == step]:
            del self._groups[group.group_id]
            self._num_started -= 1
            self._num_graded -= 1
        self._next_step = max(self._next_step, step + 1)
        self._go_on()

    async def pause(self) -> None:
        """Stop sending, and return when no request is in flight and all they brought is in the ledger.

        With partial rollouts (async mode) requests are interrupted, or stay in flight where engines hold them during a
        publish; otherwise they are waited for.
        """
        dispatcher = self.dispatcher
        dispatcher.paused = True
        dispatcher.care.expect_publish(holding=self._holds_in_flight)
        interrupt = self._interrupts
        while dispatcher.num_flying and not self._holds_in_flight:
            self.raise_error()
            if interrupt:
                await dispatcher.interrupt_all()
            self._news.clear()
            if dispatcher.num_flying:
                # An interruption may reach an engine before the request does; so it is repeated.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), dispatcher.care.tick_seconds if interrupt else None)
        await self._journal.flushed()
        self.raise_error()

    async def resume(self, version: int) -> None:
        """Go on with weights of this version; engines that have others are left out until they have them.

        Raises:
            RolloutError: a version that goes down.
        """
        dispatcher = self.dispatcher
        if version < dispatcher.version:
            raise RolloutError(f"the engines have weights of version {dispatcher.version}; version {version} is older")
        dispatcher.version = version
        await dispatcher.care.check_versions(version)
        self.raise_error()
        dispatcher.paused = False
        self._go_on()

    async def close(self) -> None:
        """End everything that this started; what is in flight is given up, what was answered is in the ledger."""
        await self._grading.close()
        await self.dispatcher.close()
        await self._journal.flushed()

    def fail(self, error: RolloutError) -> None:
        """Stop sending: whoever waits gets this error, now and later."""
        if self.error is None:
            self.error = error
            self.dispatcher.paused = True
            self._tell()

    def raise_error(self) -> None:
        """Raise what ended generation, if anything did."""
        if self.error is not None:
            raise self.error

    def _refuse_to_wait_in_vain(self, step: int, count: int) -> None:
        """Raise when a step lacks groups while none is being generated or graded, or can be begun."""
        groups = self._groups.values()
        may_begin = self.dispatcher.paused and bool(self._not_started)
        if may_begin or any(g.oldest_version is not None and not g.is_graded for g in groups):
            return
        free = sum(group.step in (None, step) for group in groups)
        self.fail(
            RolloutError(
                f"step {step} waits for {count} prompt groups and nothing is being generated or graded: of {free} that "
                f"the rollout ledger has for it, {len(self._not_started)} may not be begun before the next publish; "
                f"the ledger {self._ledger.file} and the checkpoint do not belong together, or fewer prompts were "
                "reserved than steps need. Move the ledger aside to go on without the responses in flight"
            )
        )
        self.raise_error()

    def _add(self, stored: StoredGroup) -> None:
        group = GroupWork(group_id=stored.group_id, epoch=stored.epoch, prompt=stored.prompt, step=stored.step)
        self._groups[group.group_id] = group
        self._place(group, stored)
        if group.oldest_version is None:
            heapq.heappush(self._not_started, group.group_id)
        else:
            self._num_started += 1
            self.dispatcher.enqueue(group)

    def _place(self, group: GroupWork, stored: StoredGroup) -> None:
        """Set up what is left to do of a group from what the ledger has of it."""
        group.oldest_version = stored.oldest_version
        group.is_graded = stored.state in ("graded", "committed")
        group.waiting = []
        if group.is_graded:
            self._num_graded += 1
            group.ready_rank = next(self._ready_ranks)
            return
        full: list[tuple[ResponseWork, Rollout]] = []
        budget = self.dispatcher.max_response_tokens
        for index in reversed(range(stored.num_responses)):
            rollout = stored.rollouts.get(index)
            if rollout is None or rollout.finish_reason == "abort":
                response = ResponseWork(group=group, index=index, head=rollout)
                if rollout is not None and response.num_tokens >= budget:
                    # Begun under a larger budget: under this one it would have ended here, and nothing can be asked.
                    full.append((response, cut_to_length(rollout, budget)))
                else:
                    group.waiting.append(response)
        group.open_responses = len(group.waiting) + len(full)
        if not group.open_responses:
            self._grading.add(group.group_id)
        for response, rollout in full:
            response.attempts = 1
            self._save(response, rollout)

    def _go_on(self) -> None:
        """Let in as many new groups as can be trained before they are too old, and send what waits."""
        dispatcher = self.dispatcher
        if dispatcher.paused:
            return
        limit = started_limit(
            version=dispatcher.version, next_step=self._next_step, staleness=self.staleness, per_step=self._per_step
        )
        while self._not_started and (self._num_started < limit or self._is_among_first(self._not_started[0], limit)):
            group = self._groups[heapq.heappop(self._not_started)]
            group.oldest_version = dispatcher.version
            self._num_started += 1
            dispatcher.enqueue(group)
        dispatcher.dispatch()

    def _is_among_first(self, group_id: int, limit: int) -> bool:
        """Whether a step within the limit waits for this very group, however many of later ones have begun.

        They began in an earlier life, under a larger limit; in the order of the data nothing can stand in for it.
        """
        return self._settings.order == "fixed" and sum(other < group_id for other in self._groups) < limit

    def _save(self, response: ResponseWork, rollout: Rollout) -> None:
        """Write down a response, or what there is of it; with the last of a group, have it graded."""
        group, index, attempts = response.group, response.index, response.attempts
        saved = self._journal.add(
            lambda ledger: ledger.save_response(group.group_id, index, rollout, attempts=attempts)
        )
        if rollout.finish_reason != "abort":
            group.open_responses -= 1
            if group.open_responses == 0:
                saved.add_done_callback(lambda done: self._complete(group, done))

    def _complete(self, group: GroupWork, saved: asyncio.Future[Any]) -> None:
        if not saved.cancelled() and saved.exception() is None:
            self._grading.add(group.group_id)

    def _graded(self, group_id: int) -> None:
        group = self._groups[group_id]
        group.is_graded = True
        group.ready_rank = next(self._ready_ranks)
        self._num_graded += 1
        self._tell()

    async def _batch(self, step: int, count: int) -> list[GroupWork] | None:
        """Groups to train now; those that have become too old in spite of all are drawn again first."""
        if self._num_graded < count:
            return None
        groups = list(self._groups.values())
        if self._settings.order == "fixed":
            batch = fixed_batch(sorted(groups, key=lambda group: group.group_id), step, count)
        else:
            batch = completion_batch(groups, step, count, staleness=self.staleness)
        # Only a resume under a smaller limit, or with smaller steps, can lead here with old groups.
        oldest = step - 1 - self.staleness
        old = [g for g in batch or () if g.oldest_version is not None and g.oldest_version < oldest]
        for group in old:
            await self._draw_again(group, oldest)
        return None if old else batch

    async def _draw_again(self, group: GroupWork, oldest: int) -> None:
        """Throw away the responses of a group that hold tokens of versions below `oldest`."""
        [stored] = await self._run_blocking(self._ledger.load, [group.group_id])
        kept = {
            index: rollout
            for index, rollout in stored.rollouts.items()
            if all(version >= oldest for version, _ in rollout.policy_versions)
        }
        why = f"sampled before version {oldest}"
        await self._journal.add(lambda ledger: ledger.replace_responses(group.group_id, kept, why=why))
        self.drawn_again += 1
        self._num_graded -= 1
        group.step = None
        [stored] = await self._run_blocking(self._ledger.load, [group.group_id])
        self._place(group, stored)
        if group.oldest_version is None:
            group.oldest_version = self.dispatcher.version
        self.dispatcher.enqueue(group)
        self._go_on()

    def _tell(self) -> None:
        self._news.set()

    def _failed_to_write(self, error: BaseException) -> None:
        if not isinstance(error, RolloutError):
            error = RolloutError(f"the rollout ledger cannot be written: {type(error).__name__}: {error}")
        self.fail(error)
