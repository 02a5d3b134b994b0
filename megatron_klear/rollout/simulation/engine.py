"""A stand-in for a serving engine: it takes the time that an engine would take, and can fail in every known way."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass

import numpy as np

from megatron_klear.records import FinishReason
from megatron_klear.rollout.endpoint import EndpointError, GeneratedPart, GenerationRequest, Silence, TokensCallback


@dataclass(slots=True, eq=False)
class _Run:
    """One request: `done` gets its part; `began` is None while it waits for a slot."""

    request: GenerationRequest
    on_tokens: TokensCallback | None
    done: asyncio.Future[GeneratedPart]
    total: int
    began: float | None = None
    before: int = 0
    end: asyncio.TimerHandle | None = None


class SimulatedEngine:
    """Implements `Endpoint` with tokens that are a function of the request's seed and of the weights' version.

    Args:
        name: for messages.
        remaining: how many tokens are left of a response, given the request that asks for them.
        slots: requests that run at a time; others wait their turn.
        seconds_per_token: of each running request.
        report_seconds: between reports of progress.
        version: of its weights.
        vocab_size: tokens are drawn from 1 to this number, excluded; stop tokens only at ends.

    Attributes:
        version: set it to publish weights.
        corrupt: applied to every answer; None leaves them right.
        running: requests that have a slot.
        serves_others: it brings tokens to others, also while it `hang`s for us.
    """

    def __init__(
        self,
        name: str,
        *,
        remaining: Callable[[GenerationRequest], int],
        slots: int = 64,
        seconds_per_token: float = 0.02,
        report_seconds: float = 5.0,
        version: int = 0,
        vocab_size: int = 1000,
    ) -> None:
        self._name = name
        self._remaining = remaining
        self._slots, self._seconds_per_token, self._report_seconds = slots, seconds_per_token, report_seconds
        self._vocab_size = vocab_size
        self.version = version
        self.corrupt: Callable[[GeneratedPart], GeneratedPart] | None = None
        self.requests_seen: MutableSequence[str] = []
        self._runs: dict[str, _Run] = {}
        self._waiting: collections.deque[_Run] = collections.deque()
        self._trouble = ""
        self.serves_others = False
        self._is_hung = False
        self._hung_since = 0.0
        self._reporter: asyncio.TimerHandle | None = None
        self._failing = 0
        self._losing = 0

    @property
    def name(self) -> str:
        """See `Endpoint`."""
        return self._name

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._runs) - len(self._waiting)

    async def generate(self, request: GenerationRequest, on_tokens: TokensCallback | None = None) -> GeneratedPart:
        """See `Endpoint`."""
        if self._trouble:
            raise EndpointError(f"{self.name}: {self._trouble}", retry=True)
        if self._failing:
            self._failing -= 1
            raise EndpointError(f"{self.name}: told to fail", retry=True)
        self.requests_seen.append(request.request_id)
        run = _Run(
            request=request,
            on_tokens=on_tokens,
            done=asyncio.get_running_loop().create_future(),
            total=min(self._remaining(request), request.max_new_tokens),
        )
        if self._losing:
            self._losing -= 1
            return await run.done
        self._runs[request.request_id] = run
        self._waiting.append(run)
        self._fill()
        try:
            part = await run.done
        finally:
            self._drop(run)
        return part if self.corrupt is None else self.corrupt(part)

    async def abort(self, request_id: str | None) -> None:
        """See `Endpoint`."""
        if self._trouble:
            raise EndpointError(f"{self.name}: {self._trouble}", retry=True)
        if self._is_hung:
            return
        runs = list(self._runs.values()) if request_id is None else [r for r in [self._runs.get(request_id)] if r]
        for run in runs:
            if not run.done.done():
                run.done.set_result(self._part(run, self._so_far(run), "abort"))

    async def check(self) -> int:
        """See `Endpoint`."""
        if self._trouble:
            raise EndpointError(f"{self.name}: {self._trouble}", retry=True)
        if self._is_hung:
            await asyncio.get_running_loop().create_future()
        return self.version

    def silence(self) -> Silence:
        """See `Endpoint`; of an engine that hangs, as if others always had requests at it."""
        is_silent = self._is_hung and not self.serves_others
        seconds = asyncio.get_running_loop().time() - self._hung_since if is_silent else 0.0
        return Silence(seconds=seconds, is_first=False)

    async def close(self) -> None:
        """See `Endpoint`."""
        if self._reporter is not None:
            self._reporter.cancel()
            self._reporter = None

    def die(self, why: str = "connection refused") -> None:
        """Fail every request, now and from now on."""
        self._trouble = why
        for run in list(self._runs.values()):
            if not run.done.done():
                run.done.set_exception(EndpointError(f"{self.name}: connection reset", retry=True))

    def hang(self) -> None:
        """Keep connections open and never say anything again."""
        self._is_hung = True
        self._hung_since = asyncio.get_running_loop().time()
        for run in self._runs.values():
            if run.end is not None:
                run.end.cancel()

    def revive(self, version: int) -> None:
        """Be well again, with these weights and no request."""
        self._trouble, self._is_hung, self.version = "", False, version
        self._runs.clear()
        self._waiting.clear()

    def change_speed(self, seconds_per_token: float) -> None:
        """Be quicker or slower from now on."""
        now = asyncio.get_running_loop().time()
        for run in self._runs.values():
            if run.began is not None:
                run.before, run.began = self._so_far(run), now
        self._seconds_per_token = seconds_per_token
        for run in self._runs.values():
            self._schedule_end(run)

    def fail_next(self, count: int) -> None:
        """Answer the next requests with an error, and be well otherwise."""
        self._failing = count

    def lose_next(self, count: int) -> None:
        """Never answer the next requests, and be well otherwise."""
        self._losing = count

    def retract(self) -> None:
        """Take the slot of the request with the most tokens, as for want of cache, and do not give it another."""
        running = [run for run in self._runs.values() if run.began is not None]
        if running:
            run = max(running, key=self._so_far)
            run.before, run.began = self._so_far(run), None
            self._schedule_end(run)

    def _fill(self) -> None:
        while self._waiting and self.running < self._slots:
            run = self._waiting.popleft()
            run.began = asyncio.get_running_loop().time()
            self._schedule_end(run)
        if self._runs and self._reporter is None:
            self._reporter = asyncio.get_running_loop().call_later(self._report_seconds, self._report)

    def _schedule_end(self, run: _Run) -> None:
        if run.end is not None:
            run.end.cancel()
        if run.began is not None and not self._is_hung:
            left = (run.total - run.before) * self._seconds_per_token
            run.end = asyncio.get_running_loop().call_at(run.began + left, self._finish, run)

    def _finish(self, run: _Run) -> None:
        if not run.done.done():
            is_stop = self._remaining(run.request) <= run.request.max_new_tokens
            run.done.set_result(self._part(run, run.total, "stop" if is_stop else "length"))

    def _drop(self, run: _Run) -> None:
        if self._runs.pop(run.request.request_id, None) is None:
            return
        if run.end is not None:
            run.end.cancel()
        if run.began is None and run in self._waiting:
            self._waiting.remove(run)
        self._fill()

    def _so_far(self, run: _Run) -> int:
        """Tokens by now; the last one comes only with the end."""
        if run.began is None:
            return run.before
        passed = asyncio.get_running_loop().time() - run.began
        return max(0, min(run.before + int(passed / self._seconds_per_token), run.total - 1))

    def _report(self) -> None:
        self._reporter = None
        if self._is_hung or self._trouble:
            return
        for run in self._runs.values():
            tokens = self._so_far(run)
            if tokens and run.began is not None and run.on_tokens is not None:
                run.on_tokens(tokens)
        if self._runs:
            self._reporter = asyncio.get_running_loop().call_later(self._report_seconds, self._report)

    def _part(self, run: _Run, count: int, finish: FinishReason) -> GeneratedPart:
        rng = np.random.default_rng([run.request.seed, len(run.request.token_ids), self.version])
        tokens = rng.integers(1, self._vocab_size, run.total)[:count]
        stops = run.request.sampling.stop_token_ids
        logprobs = -rng.random(run.total, np.float32)[:count]
        if stops:
            tokens[np.isin(tokens, stops)] = 0
            if finish == "stop":
                tokens[-1] = stops[0]
        return GeneratedPart(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=finish,
            policy_versions=((self.version, count),) if count else (),
        )
