"""The asynchronous core of the manager: what is sent where, and when a step has its groups."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_klear.config import SchedulingSettings
from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade, RolloutGroup
from megatron_klear.rollout.endpoint import Endpoint, EndpointError, GeneratedPart, GenerationRequest
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger, StoredGroup
from megatron_klear.rollout.manager.answers import extended, problem_with
from megatron_klear.rollout.manager.engines import Engine, EnginePool
from megatron_klear.rollout.manager.health import EngineCare, Restart
from megatron_klear.rollout.manager.journal import Journal, RunBlocking
from megatron_klear.rollout.manager.order import completion_batch, fixed_batch, started_limit
from megatron_klear.rollout.manager.work import GroupWork, Request, ResponseWork, request_seed

Grader = Callable[[Sequence[RolloutGroup]], Sequence[Sequence[Grade]]]
"""Grades whole groups, one grade per response; blocking, called outside the event loop by one caller at a time."""

_GRADED_TOGETHER = 32
_SPREAD = 4
"""How many more requests than the least loaded engine a group's own engine may have, to share its prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is drawn of each prompt, the same for the whole run.

    Attributes:
        params: temperature, nucleus, token budget, stop tokens.
        num_responses: M.
        seed: run.seed.
        vocab_size: number of token ids; None does not check answers for it.
    """

    params: SamplingParams
    num_responses: int
    seed: int
    vocab_size: int | None = None


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
        run_blocking: RunBlocking = asyncio.to_thread,
    ) -> None:
        self.settings, self.sampling = settings, sampling
        self.staleness = {"sync": 0, "one_step_off": 1, "async": settings.max_staleness}[settings.mode]
        self.pool = EnginePool(endpoints, most_requests=settings.in_flight)
        self.care = EngineCare(self.pool, settings, restart, on_lost=self._give_up_requests, on_ready=self._dispatch,
                               on_failure=self.fail, move=self._move)  # fmt: skip
        self.error: RolloutError | None = None
        self.counts: Counter[str] = Counter()
        self.version = -1
        self._ledger, self._grade, self._run_blocking = ledger, grade, run_blocking
        self._journal = Journal(ledger, run_blocking, self._failed_to_write)
        self._per_step = groups_per_step
        self._groups: dict[int, GroupWork] = {}
        self._queue: list[int] = []
        self._not_started: list[int] = []
        self._started = 0
        self._next_step = 1
        self._graded = 0
        self._ready_ranks = itertools.count()
        self._to_grade: list[int] = []
        self._grader: asyncio.Task[None] | None = None
        self._paused = True
        self._num_flying = 0
        self._life, self._request_numbers = uuid.uuid4().hex[:8], itertools.count()
        self._news = asyncio.Event()
        self._side_tasks: set[asyncio.Task[Any]] = set()

    # -- the trainer's side -------------------------------------------------------------------------------------------

    async def start(self, *, version: int, next_step: int) -> None:
        """Take over what the ledger has in flight; nothing is sent before `resume`.

        Args:
            version: of the weights that the engines have.
            next_step: first step to train.
        """
        self.version, self._next_step = version, next_step
        for group_id in self._ledger.unfinished():
            self._add(self._ledger.load([group_id])[0])
        self.care.start()

    def add(self, group_ids: Sequence[int]) -> None:
        """Draw these reserved groups, too; those it has already are left as they are."""
        fresh = [group_id for group_id in group_ids if group_id not in self._groups]
        for stored in self._ledger.load(fresh):
            if stored.state != "trained":
                self._add(stored)
        self._dispatch()

    async def take(self, step: int, count: int, timeout: float | None = None) -> list[StoredGroup] | None:
        """The groups of a step, committed to it; None when they are not there in time.

        Asked again for the same step it gives the same groups.

        Raises:
            RolloutError: generation cannot go on.
        """
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        while True:
            self._raise_error()
            self._news.clear()
            batch = await self._batch(step, count)
            if batch is not None:
                break
            rest = None if deadline is None else deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._news.wait(), None if rest is None else max(rest, 0.0))
            except TimeoutError:
                return None
        ids = [group.group_id for group in batch]
        for group in batch:
            group.step = step
        await self._journal.add(lambda ledger: ledger.commit(step, ids))
        stored: list[StoredGroup] = await self._run_blocking(self._ledger.load, ids)
        return stored

    def trained(self, step: int) -> None:
        """Forget the groups of a step that the ledger has as trained."""
        for group in [g for g in self._groups.values() if g.step == step]:
            del self._groups[group.group_id]
            self._started -= 1
            self._graded -= 1
        self._next_step = max(self._next_step, step + 1)
        self._dispatch()

    async def pause(self) -> None:
        """Stop sending, and return when no request is in flight and all they brought is in the ledger.

        With partial rollouts (async mode) requests are interrupted; otherwise they are waited for.
        """
        self._paused = True
        interrupt = self.settings.mode == "async" and self.settings.partial_rollouts
        while self._num_flying:
            self._raise_error()
            if interrupt:
                busy = [engine for engine in self.pool if engine.requests]
                await asyncio.gather(*(self._abort(engine.endpoint, None) for engine in busy))
            self._news.clear()
            if self._num_flying:
                # An interruption may reach an engine before the request does; so it is repeated.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), self.care.tick_seconds if interrupt else None)
        await self._journal.flushed()
        self._raise_error()

    async def resume(self, version: int) -> None:
        """Go on with weights of this version; engines that have others are left out until they have them.

        Raises:
            RolloutError: a version that goes down.
        """
        if version < self.version:
            raise RolloutError(f"the engines have weights of version {self.version}; version {version} is older")
        self.version = version
        await self.care.check_versions(version)
        self._paused = False
        self._dispatch()
        self._raise_error()

    async def close(self) -> None:
        """End everything that this started; what is in flight is given up, what was answered is in the ledger."""
        self._paused = True
        tasks = [*self._side_tasks, *self.care.stop()]
        tasks += [r.task for e in self.pool for r in e.requests.values() if r.task is not None]
        if self._grader is not None:
            tasks.append(self._grader)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._journal.flushed()
        await asyncio.gather(*(engine.endpoint.close() for engine in self.pool), return_exceptions=True)

    def fail(self, error: RolloutError) -> None:
        """Stop everything: whoever waits gets this error, now and later."""
        if self.error is None:
            self.error = error
            self._paused = True
            self._news.set()

    # -- groups -------------------------------------------------------------------------------------------------------

    def _add(self, stored: StoredGroup) -> None:
        group = GroupWork(group_id=stored.group_id, epoch=stored.epoch, prompt=stored.prompt, step=stored.step)
        self._groups[group.group_id] = group
        self._place(group, stored)
        if group.oldest_version is None:
            heapq.heappush(self._not_started, group.group_id)
        else:
            self._started += 1
            self._enqueue(group)

    def _place(self, group: GroupWork, stored: StoredGroup) -> None:
        """Set up what is left to do of a group from what the ledger has of it."""
        group.oldest_version = stored.oldest_version
        group.is_graded = stored.state in ("graded", "committed")
        group.waiting = []
        if group.is_graded:
            self._graded += 1
            group.ready_rank = next(self._ready_ranks)
            return
        for index in reversed(range(stored.num_responses)):
            rollout = stored.rollouts.get(index)
            if rollout is None or rollout.finish_reason == "abort":
                group.waiting.append(ResponseWork(group=group, index=index, head=rollout))
        group.open_responses = len(group.waiting)
        if not group.waiting:
            self._grade_soon(group.group_id)

    def _enqueue(self, group: GroupWork) -> None:
        if group.waiting and not group.is_queued:
            group.is_queued = True
            heapq.heappush(self._queue, group.group_id)

    def _start_groups(self) -> None:
        """Let as many new groups in as can be trained before they are too old."""
        limit = started_limit(
            version=self.version, next_step=self._next_step, staleness=self.staleness, per_step=self._per_step
        )
        while self._not_started and self._started < limit:
            group = self._groups[heapq.heappop(self._not_started)]
            group.oldest_version = self.version
            self._started += 1
            self._enqueue(group)

    async def _batch(self, step: int, count: int) -> list[GroupWork] | None:
        """Groups to train now; those that have become too old in spite of all are drawn again first."""
        if self._graded < count:
            return None
        groups = list(self._groups.values())
        if self.settings.order == "fixed":
            batch = fixed_batch(sorted(groups, key=lambda g: g.group_id), step, count)
        else:
            batch = completion_batch(groups, step, count, staleness=self.staleness)
        # Only a resume with a smaller limit, or smaller steps, can lead here with old groups.
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
        self.counts["groups drawn again for their age"] += 1
        self._graded -= 1
        group.step = None
        [stored] = await self._run_blocking(self._ledger.load, [group.group_id])
        self._place(group, stored)
        if group.oldest_version is None:
            group.oldest_version = self.version
        self._enqueue(group)
        self._dispatch()

    def _grade_soon(self, group_id: int) -> None:
        self._to_grade.append(group_id)
        if self._grader is None:
            self._grader = asyncio.create_task(self._grade_all())

    async def _grade_all(self) -> None:
        try:
            while self._to_grade and self.error is None:
                ids, self._to_grade = self._to_grade[:_GRADED_TOGETHER], self._to_grade[_GRADED_TOGETHER:]
                grades = await self._run_blocking(self._grades_of, ids)
                saved = [self._journal.add(_saving_grades(i, g)) for i, g in zip(ids, grades, strict=True)]
                await asyncio.gather(*saved)
                for group_id in ids:
                    group = self._groups[group_id]
                    group.is_graded = True
                    group.ready_rank = next(self._ready_ranks)
                    self._graded += 1
                self._news.set()
        except RolloutError as error:
            self.fail(error)
        except Exception as error:  # the grader is code of another room; what it raises ends the run with its words
            self.fail(RolloutError(f"grading failed: {type(error).__name__}: {error}"))
        finally:
            self._grader = None

    def _grades_of(self, group_ids: list[int]) -> Sequence[Sequence[Grade]]:
        return self._grade([stored.rollout_group() for stored in self._ledger.load(group_ids)])

    # -- requests -----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send what waits, in the order of the walk, as far as engines have room."""
        if self._paused:
            return
        self._start_groups()
        while self._queue:
            group = self._groups.get(self._queue[0])
            if group is None or not group.waiting:
                heapq.heappop(self._queue)
                if group is not None:
                    group.is_queued = False
                continue
            response = group.waiting[-1]
            engine = self.pool.pick(near=group.engine, avoid=response.avoid, spread=_SPREAD)
            if engine is None:
                return
            group.engine = engine
            group.waiting.pop()
            self._send(response, engine)

    def _send(self, response: ResponseWork, engine: Engine) -> None:
        now = asyncio.get_running_loop().time()
        request = Request(
            request_id=f"{self._life}-{response.group.group_id}-{response.index}-{next(self._request_numbers)}",
            response=response,
            engine=engine,
            sent_version=self.version,
            last_progress=now,
        )
        if not engine.requests:
            engine.last_progress = now
        engine.requests[request.request_id] = request
        self.pool.offer(engine)
        response.request = request
        response.attempts += 1
        self._num_flying += 1
        self.counts["requests"] += 1
        request.task = asyncio.create_task(self._serve(request))

    async def _serve(self, request: Request) -> None:
        """Wait for an engine's answer and do what it calls for."""
        response, engine = request.response, request.engine
        group, params = response.group, self.sampling.params
        head_ids = np.empty(0, np.int64) if response.head is None else response.head.response_ids
        asked = GenerationRequest(
            request_id=request.request_id,
            token_ids=np.concatenate([group.prompt.token_ids, head_ids]),
            max_new_tokens=params.max_response_tokens - len(head_ids),
            sampling=params,
            seed=request_seed(self.sampling.seed, group.epoch, group.prompt.prompt_id, response.index, len(head_ids)),
        )
        loop = asyncio.get_running_loop()

        def note(tokens: int) -> None:
            engine.tokens += max(0, tokens - request.tokens)
            engine.has_answered = True
            request.tokens = tokens
            request.last_progress = engine.last_progress = loop.time()

        try:
            part = await engine.endpoint.generate(asked, note)
            if request.is_abandoned:
                return
            newest = self.version + 1 if self._paused else self.version
            problem = problem_with(
                part, asked, vocab_size=self.sampling.vocab_size, versions=(request.sent_version, newest)
            )
            if problem:
                self.counts["malformed answers"] += 1
                raise EndpointError(f"{engine.name}: {problem}", retry=True)
        except asyncio.CancelledError:
            if not request.is_abandoned:
                self._release(request)
            raise
        except EndpointError as error:
            self._failed(request, error)
        except RolloutError as error:
            self.fail(error)
            self._release(request)
        except Exception as error:  # an engine's client may raise anything; no answer is worth a run
            self._failed(request, EndpointError(f"{engine.name}: {type(error).__name__}: {error}", retry=True))
        else:
            note(len(part.token_ids))
            self._release(request)
            self._accept(request, asked, part)
        self._dispatch()

    def _accept(self, request: Request, asked: GenerationRequest, part: GeneratedPart) -> None:
        """Keep an answer: the end of a response, or a part of it to be continued."""
        response, engine = request.response, request.engine
        engine.failures = engine.restarts = 0
        if part.finish_reason == "abort" and request.is_moving and self.settings.order == "fixed":
            # Whether an engine was slow must not show in what is trained.
            self._send_again(response)
            return
        rollout = extended(response.head, part, is_full=len(part.token_ids) == asked.max_new_tokens)
        group, index, attempts = response.group, response.index, response.attempts
        saved = self._journal.add(
            lambda ledger: ledger.save_response(group.group_id, index, rollout, attempts=attempts)
        )
        self.counts["tokens"] += len(part.token_ids)
        if rollout.finish_reason == "abort":
            self.counts["interrupted"] += 1
            response.head = rollout if len(rollout.response_ids) else None
            self._send_again(response)
            return
        response.is_finished, response.head = True, None
        group.open_responses -= 1
        self.counts["responses"] += 1
        if group.open_responses == 0:
            saved.add_done_callback(lambda done: done.exception() or self._grade_soon(group.group_id))

    def _failed(self, request: Request, error: EndpointError) -> None:
        """An engine gave no whole answer: the response goes to another, and the engine is looked at."""
        if request.is_abandoned:
            return
        response, engine = request.response, request.engine
        self.counts["failed requests"] += 1
        engine.last_error = str(error)
        self._release(request)
        if not error.retry:
            self.fail(RolloutError(f"prompt {response.group.prompt.prompt_id} cannot be answered: {error}"))
            return
        response.avoid = engine
        self._send_again(response)
        self.care.suspect(engine, on_well=lambda: self._count_failure(response, error))

    def _count_failure(self, response: ResponseWork, error: EndpointError) -> None:
        """A request failed on an engine that is well: that must not go on for ever."""
        response.failures += 1
        if response.failures >= self.settings.max_failures:
            self.fail(
                RolloutError(
                    f"prompt {response.group.prompt.prompt_id}, response {response.index}: {response.failures} requests "
                    f"failed on engines that answer otherwise (scheduling.max_failures), the last one: {error}"
                )
            )

    def _give_up_requests(self, engine: Engine) -> None:
        """Send everything that is in flight at a lost engine to others, under new ids."""
        for request in list(engine.requests.values()):
            self.abandon(request)
        self._dispatch()

    def abandon(self, request: Request) -> None:
        """Take a response back from an engine that does not answer; an answer that still comes is ignored."""
        request.is_abandoned = True
        self.counts["abandoned requests"] += 1
        self._release(request)
        request.response.avoid = request.engine
        self._send_again(request.response)
        if request.task is not None:
            request.task.cancel()
        if request.engine.status == "serving":
            self._spawn(self._abort(request.engine.endpoint, request.request_id))

    def _move(self, request: Request, *, hung: bool) -> None:
        """Take a request away from a slow engine, with its tokens, or from one that lost it."""
        if hung:
            self.abandon(request)
            self._dispatch()
        elif not request.is_moving:
            request.is_moving = True
            request.response.avoid = request.engine
            self.counts["moved requests"] += 1
            self._spawn(self._abort(request.engine.endpoint, request.request_id))

    def _release(self, request: Request) -> None:
        if request.engine.requests.pop(request.request_id, None) is not None:
            self._num_flying -= 1
            request.response.request = None
            self.pool.offer(request.engine)
            if self._num_flying == 0:
                self._news.set()

    def _send_again(self, response: ResponseWork) -> None:
        response.group.waiting.append(response)
        self._enqueue(response.group)

    async def _abort(self, endpoint: Endpoint, request_id: str | None) -> None:
        """Interrupt; an engine that cannot be told is found out by its silence."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(endpoint.abort(request_id), self.care.tick_seconds)

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    def _failed_to_write(self, error: BaseException) -> None:
        if not isinstance(error, RolloutError):
            error = RolloutError(f"the rollout ledger cannot be written: {type(error).__name__}: {error}")
        self.fail(error)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def _saving_grades(group_id: int, grades: Sequence[Grade]) -> Callable[[Ledger], None]:
    return lambda ledger: ledger.save_grades(group_id, grades)
