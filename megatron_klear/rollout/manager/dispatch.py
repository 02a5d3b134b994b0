"""Requests: which response goes to which engine, what an answer means, and what happens when none comes."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_klear.config import SchedulingSettings
from megatron_klear.errors import RolloutError
from megatron_klear.records import Rollout
from megatron_klear.rollout.endpoint import Endpoint, EndpointError, GeneratedPart, GenerationRequest
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.manager.answers import extended
from megatron_klear.rollout.manager.engines import Engine, EnginePool
from megatron_klear.rollout.manager.health import EngineCare, Restart
from megatron_klear.rollout.manager.load import Load
from megatron_klear.rollout.manager.work import GroupWork, Request, ResponseWork, response_seed
from megatron_klear.rollout.soundness import problem_with

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


class Dispatcher:
    """Keeps engines filled with the responses that wait, in the order of the groups.

    Args:
        endpoints: the engines.
        settings: limits.
        sampling: what is drawn.
        restart: see `EngineCare`.
        on_part: called with a response and all its tokens whenever some have come; finish reason `abort` means that
            it goes on.
        on_idle: called when the last request in flight is done.
        on_failure: called when generation cannot go on.
    """

    def __init__(
        self,
        endpoints: list[Endpoint],
        settings: SchedulingSettings,
        sampling: Sampling,
        restart: Restart | None,
        *,
        on_part: Callable[[ResponseWork, Rollout], None],
        on_idle: Callable[[], None],
        on_failure: Callable[[RolloutError], None],
    ) -> None:
        self._settings, self._sampling = settings, sampling
        self._on_part, self._on_idle, self._on_failure = on_part, on_idle, on_failure
        self.pool = EnginePool(endpoints, most_requests=settings.in_flight)
        self.care = EngineCare(
            self.pool, settings, restart, on_lost=self._take_back, on_ready=self.dispatch, on_failure=on_failure,
            move=self._move,
        )  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.version = -1
        self.paused = True
        self.num_flying = 0
        self.load = Load(lambda: asyncio.get_running_loop().time())
        self._queue: list[tuple[int, GroupWork]] = []
        self._life, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        self._side_tasks: set[asyncio.Task[Any]] = set()

    @property
    def max_response_tokens(self) -> int:
        """Token budget of a response, all its requests together."""
        return self._sampling.params.max_response_tokens

    def enqueue(self, group: GroupWork) -> None:
        """Let a group's waiting responses be sent when their turn comes; `dispatch` does it."""
        if group.waiting and not group.is_queued:
            group.is_queued = True
            heapq.heappush(self._queue, (group.group_id, group))

    def dispatch(self) -> None:
        """Send what waits, in the order of the walk, as far as engines have room."""
        while self._queue and not self.paused:
            group = self._queue[0][1]
            if not group.waiting:
                heapq.heappop(self._queue)
                group.is_queued = False
                continue
            engine = self.pool.pick(near=group.engine, avoid=group.waiting[-1].avoid, spread=_SPREAD)
            if engine is None:
                return
            group.engine = engine
            self._send(group.waiting.pop(), engine)

    async def interrupt_all(self) -> None:
        """Ask all engines to return what they have."""
        busy = [engine for engine in self.pool if engine.requests]
        await asyncio.gather(*(self._abort(engine.endpoint, None) for engine in busy))

    async def close(self) -> None:
        """Give up everything in flight and close the endpoints."""
        self.paused = True
        tasks = [*self._side_tasks, *self.care.stop()]
        tasks += [r.task for e in self.pool for r in e.requests.values() if r.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(engine.endpoint.close() for engine in self.pool), return_exceptions=True)

    def _send(self, response: ResponseWork, engine: Engine) -> None:
        now = asyncio.get_running_loop().time()
        request = Request(
            request_id=f"{self._life}-{response.group.group_id}-{response.index}-{next(self._numbers)}",
            response=response,
            engine=engine,
            sent_version=self.version,
            last_progress=now,
        )
        self.load.sent(first_of_engine=not engine.requests)
        if not engine.requests:
            engine.last_progress = now
        engine.requests[request.request_id] = request
        self.pool.offer(engine)
        response.attempts += 1
        self.num_flying += 1
        self.counts["requests"] += 1
        request.task = asyncio.create_task(self._serve(request))

    def _asked(self, request: Request) -> GenerationRequest:
        """What is left to draw of a response.

        Raises:
            RolloutError: nothing is; such a response has ended and must not be sent.
        """
        response, params = request.response, self._sampling.params
        group, token_ids = response.group, response.group.prompt.token_ids
        if response.num_tokens >= params.max_response_tokens:
            raise RolloutError(
                f"prompt {group.prompt.prompt_id}, response {response.index}: has {response.num_tokens} tokens, "
                f"rollout.max_response_tokens = {params.max_response_tokens}"
            )
        if response.head is not None:
            token_ids = np.concatenate([token_ids, response.head.response_ids])
        return GenerationRequest(
            request_id=request.request_id,
            token_ids=token_ids,
            max_new_tokens=params.max_response_tokens - response.num_tokens,
            sampling=params,
            seed=response_seed(self._sampling.seed, group.epoch, group.prompt.prompt_id, response.index),
        )

    async def _serve(self, request: Request) -> None:
        """Wait for an engine's answer and do what it calls for."""
        engine = request.engine
        loop = asyncio.get_running_loop()

        def note(tokens: int) -> None:
            engine.tokens += max(0, tokens - request.tokens)
            engine.has_answered = True
            request.tokens = tokens
            request.last_progress = engine.last_progress = loop.time()

        try:
            asked = self._asked(request)
            part = await engine.endpoint.generate(asked, note)
            if request.is_abandoned:
                return
            self._require_sound(request, asked, part)
        except EndpointError as error:
            self._failed(request, error)
        except RolloutError as error:
            self._release(request)
            self._on_failure(error)
        except Exception as error:  # an engine's client may raise anything; no answer is worth a run
            self._failed(request, EndpointError(f"{engine.name}: {type(error).__name__}: {error}", retry=True))
        else:
            note(len(part.token_ids))
            self._release(request)
            self._accept(request, asked, part)
        self.dispatch()

    def _require_sound(self, request: Request, asked: GenerationRequest, part: GeneratedPart) -> None:
        """Refuse an answer that cannot be right.

        Raises:
            EndpointError: to be tried again elsewhere.
        """
        newest = self.version + 1 if self.paused else self.version  # new weights may be in before `resume` says so
        problem = problem_with(
            part, asked, vocab_size=self._sampling.vocab_size, versions=(request.sent_version, newest)
        )
        if problem:
            raise EndpointError(f"{request.engine.name}: {problem}", retry=True, malformed=True)
        was_interrupted = self.paused or request.is_moving or request.sent_version < self.version
        if part.finish_reason == "abort" and not len(part.token_ids) and not was_interrupted:
            raise EndpointError(f"{request.engine.name}: gave a request back untouched, unasked", retry=True)

    def _accept(self, request: Request, asked: GenerationRequest, part: GeneratedPart) -> None:
        """Keep an answer: the end of a response, or a part of it to be continued."""
        response, engine = request.response, request.engine
        if len(part.token_ids):
            engine.failures = engine.restarts = 0
        if part.finish_reason == "abort" and request.is_moving and self._settings.order == "fixed":
            # Whether an engine was slow must not show in what is trained.
            self._send_again(response)
            return
        rollout = extended(response.head, part, is_full=len(part.token_ids) == asked.max_new_tokens)
        self.counts["tokens"] += len(part.token_ids)
        self.load.brought(len(part.token_ids))
        if rollout.finish_reason == "abort":
            self.counts["interrupted"] += 1
            response.head = rollout if len(rollout.response_ids) else None
            self._send_again(response)
        else:
            self.counts["responses"] += 1
            response.head = None
        self._on_part(response, rollout)

    def _failed(self, request: Request, error: EndpointError) -> None:
        """An engine gave no whole answer: the response goes to another, and the engine is looked at."""
        if request.is_abandoned:
            return
        response, engine = request.response, request.engine
        self.counts["failed requests"] += 1
        self.counts["malformed answers"] += error.malformed
        engine.last_error = str(error)
        self._release(request)
        if not error.retry:
            self._on_failure(RolloutError(f"prompt {response.group.prompt.prompt_id} cannot be answered: {error}"))
            return
        response.avoid = engine
        self._send_again(response)
        self.care.suspect(engine, on_well=lambda: self._count_failure(response, error))

    def _count_failure(self, response: ResponseWork, error: EndpointError) -> None:
        """A request failed on an engine that is well: that must not go on for ever."""
        response.failures += 1
        if response.failures >= self._settings.max_failures:
            prompt_id = response.group.prompt.prompt_id
            self._on_failure(
                RolloutError(
                    f"prompt {prompt_id}, response {response.index}: {response.failures} requests failed on engines "
                    f"that answer otherwise (scheduling.max_failures), the last one: {error}"
                )
            )

    def _take_back(self, engine: Engine) -> None:
        """Send everything that is in flight at a lost engine to others, under new ids."""
        for request in list(engine.requests.values()):
            self._abandon(request)
        self.dispatch()

    def _abandon(self, request: Request) -> None:
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
        """Take a request away from an engine that is slow, with its tokens, or that has lost it."""
        if hung:
            self._abandon(request)
            self.dispatch()
        elif not request.is_moving:
            request.is_moving = True
            request.response.avoid = request.engine
            self.counts["moved requests"] += 1
            self._spawn(self._abort(request.engine.endpoint, request.request_id))

    def _release(self, request: Request) -> None:
        if request.engine.requests.pop(request.request_id, None) is not None:
            self.num_flying -= 1
            self.load.ended(last_of_engine=not request.engine.requests)
            self.pool.offer(request.engine)
            if self.num_flying == 0:
                self._on_idle()

    def _send_again(self, response: ResponseWork) -> None:
        response.group.waiting.append(response)
        self.enqueue(response.group)

    async def _abort(self, endpoint: Endpoint, request_id: str | None) -> None:
        """Interrupt; an engine that cannot be told is found out by its silence."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(endpoint.abort(request_id), self.care.tick_seconds)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
