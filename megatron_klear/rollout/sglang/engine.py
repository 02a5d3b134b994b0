"""Rollouts from several servers at once, for a caller that waits: whole groups, each at the least busy server."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout.endpoint import Endpoint, EndpointError, GeneratedPart, GenerationRequest
from megatron_klear.rollout.engine import ProgressCallback, RolloutCallback, RolloutProgress, SamplingParams
from megatron_klear.rollout.sharding import require_unique_ids
from megatron_klear.rollout.soundness import problem_with

log = logging.getLogger(__name__)

_RETRY_PAUSE_SECONDS = 0.5
_PROGRESS_SECONDS = 0.2


class EndpointPool:
    """Shares requests over endpoints; used from one event loop.

    Args:
        endpoints: at least one.
        in_flight: requests that one endpoint has at a time.
        retries: how often a request is sent again after a failure that may pass.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, in_flight: int, retries: int) -> None:
        if not endpoints:
            raise RolloutError("there is no engine to generate with (sglang.servers, sglang.urls)")
        self.endpoints = list(endpoints)
        self._slots = [asyncio.Semaphore(in_flight) for _ in endpoints]
        self._outstanding = [0] * len(endpoints)
        self._failing: set[int] = set()
        self.hanging: set[int] = set()
        """Places of endpoints that brought no token to anybody in time; until one comes, or a new call begins."""
        self._retries = retries
        self.failures = self.malformed = 0
        self.version: int | None = None
        """Of the weights in use; tokens come from these, or others in use since a call began. None does not look."""
        self.is_in_use: Callable[[int], bool] = lambda place: True
        """Whether the endpoint at a place gets requests; asked whenever one is sent or moves to another endpoint."""
        self._numbers = itertools.count()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
        on_rollout: RolloutCallback | None = None,
        finished: dict[tuple[str, int], Rollout] | None = None,
        waits_for_hanging: bool = True,
    ) -> list[RolloutGroup]:
        """Draw `num_responses` responses to each prompt; groups come back in the order of `prompts`.

        A response's seed depends on (seed, prompt_id, its index) alone; so do its tokens with `sglang.deterministic`.

        Args:
            prompts: each with an id of its own.
            num_responses: M, at least 1.
            sampling: temperature, nucleus, length and stop tokens.
            seed: of the requests.
            on_progress: called now and then and at the end.
            on_rollout: called with every response that is drawn.
            finished: responses by prompt and index. Those that it holds are not drawn again; those drawn are added, so
                that they outlive a failure of others.
            waits_for_hanging: whether endpoints are asked again where all of them hang; not where the caller has them
                started anew, which no further wait would do.

        Raises:
            RolloutError: a request that cannot be served, or one that failed more often than it is retried.
        """
        require_unique_ids(prompts)
        if num_responses < 1:
            raise RolloutError(f"num_responses is {num_responses} (rollout.responses_per_prompt); must be at least 1")
        rollouts = {} if finished is None else finished
        progress = _Progress(len(prompts) * num_responses, on_progress, rollouts)
        self.hanging.clear()  # each may show again that it works

        async def one(prompt: Prompt, index: int, place: int) -> None:
            rollout = await self._respond(prompt, index, sampling, seed, place, progress, waits_for_hanging)
            rollouts[prompt.prompt_id, index] = rollout
            if on_rollout is not None:
                on_rollout(prompt, index, rollout)

        try:
            async with asyncio.TaskGroup() as tasks:
                for prompt in prompts:
                    missing = [i for i in range(num_responses) if (prompt.prompt_id, i) not in rollouts]
                    if not missing:
                        continue
                    # A whole group at one server: all but the first of it find the prompt in its cache.
                    place = self._least_busy()
                    self._outstanding[place] += len(missing)
                    for index in missing:
                        tasks.create_task(one(prompt, index, place))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        progress.report(last=True)
        return [
            RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[prompt.prompt_id, i] for i in range(num_responses)))
            for prompt in prompts
        ]

    async def _respond(
        self,
        prompt: Prompt,
        index: int,
        sampling: SamplingParams,
        seed: int,
        place: int,
        progress: _Progress,
        waits_for_hanging: bool,
    ) -> Rollout:
        """One response; parts that were interrupted are continued, and failures tried again."""
        key, oldest = (prompt.prompt_id, index), self.version
        parts: list[GeneratedPart] = []
        failures = 0
        try:
            while True:
                request = self._request(prompt, index, sampling, seed, parts)
                done = sum(len(part.token_ids) for part in parts)
                try:
                    async with self._slots[place]:
                        if place in self.hanging and not self._all_hang():
                            place = self._moved(place)  # it waited for a slot of one that hangs meanwhile
                            continue
                        part = await self.endpoints[place].generate(request, progress.counter(key, done))
                    if part.finish_reason == "abort" and not len(part.token_ids):
                        name = self.endpoints[place].name
                        raise EndpointError(f"{name}: gave request {request.request_id} back untouched", retry=True)
                    self._require_sound(self.endpoints[place].name, part, request, oldest)
                except EndpointError as error:
                    self.failures += 1
                    self.malformed += error.malformed
                    failures += 1
                    progress.count(key, done)
                    if error.hangs:
                        self.hanging.add(place)
                    if not error.retry or failures > self._retries or (not waits_for_hanging and self._all_hang()):
                        raise
                    log.warning("%s; asking again (%d of %d, sglang.retries)", error, failures, self._retries)
                    self._failing.add(place)
                    await asyncio.sleep(_RETRY_PAUSE_SECONDS * failures)
                    place = self._moved(place)
                    continue
                self._failing.discard(place)
                self.hanging.discard(place)
                parts.append(part)
                length = done + len(part.token_ids)
                if part.finish_reason != "abort":
                    return _joined(parts)
                if length >= sampling.max_response_tokens:
                    return _joined(parts, finish_reason="length")
        finally:
            self._outstanding[place] -= 1
            if parts and parts[-1].finish_reason != "abort":
                progress.finish(key)

    def _require_sound(self, name: str, part: GeneratedPart, request: GenerationRequest, oldest: int | None) -> None:
        """Refuse an answer that cannot be right, as of weights that were in use neither when the call began nor since.

        Raises:
            EndpointError: to be tried again elsewhere.
        """
        in_use = None if self.version is None or oldest is None else (oldest, self.version)
        problem = problem_with(part, request, vocab_size=None, versions=in_use)
        if problem:
            raise EndpointError(f"{name}: {problem}", retry=True, malformed=True)

    def _request(
        self, prompt: Prompt, index: int, sampling: SamplingParams, seed: int, parts: Sequence[GeneratedPart]
    ) -> GenerationRequest:
        done = sum(len(part.token_ids) for part in parts)
        return GenerationRequest(
            request_id=f"{prompt.prompt_id}#{index}-{seed:x}-{next(self._numbers)}",
            token_ids=np.concatenate([prompt.token_ids, *(part.token_ids for part in parts)]),
            max_new_tokens=sampling.max_response_tokens - done,
            sampling=sampling,
            seed=response_seed(seed, prompt.prompt_id, index),
        )

    def _all_hang(self) -> bool:
        return self.hanging.issuperset(self._in_use())

    def _least_busy(self) -> int:
        return min(self._in_use(), key=self._outstanding.__getitem__)

    def _in_use(self) -> list[int]:
        places = [place for place in range(len(self.endpoints)) if self.is_in_use(place)]
        if not places:
            text = f"none of the {len(self.endpoints)} engines gets the weights that are published any more"
            raise EndpointError(text, retry=True)
        return places

    def _moved(self, place: int) -> int:
        """Another endpoint than `place` where there is one, rather one that works; keeps the count of what each has.

        One that fails at once has few outstanding, and would draw all tries.
        """
        others = [i for i in self._in_use() if i != place] or [place]
        chosen = min(others, key=lambda i: (i in self.hanging, i in self._failing, self._outstanding[i]))
        self._outstanding[place] -= 1
        self._outstanding[chosen] += 1
        return chosen


class _Progress:
    """Counts tokens and finished responses, and passes them on now and then."""

    def __init__(
        self, total: int, callback: ProgressCallback | None, finished: Mapping[tuple[str, int], Rollout]
    ) -> None:
        self._total = total
        self._callback = callback
        self._tokens = {key: len(rollout.response_ids) for key, rollout in finished.items()}
        self._generated = sum(self._tokens.values())
        self._finished = len(finished)
        self._reported = 0.0

    def counter(self, key: tuple[str, int], done: int) -> Callable[[int], None]:
        """What an endpoint calls for one request; `done` tokens came from earlier parts."""
        return lambda tokens: self.count(key, done + tokens)

    def count(self, key: tuple[str, int], tokens: int) -> None:
        self._generated += tokens - self._tokens.get(key, 0)
        self._tokens[key] = tokens
        self.report()

    def finish(self, key: tuple[str, int]) -> None:
        self._finished += 1
        self.report()

    def report(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if self._callback is None or (now - self._reported < _PROGRESS_SECONDS and not last):
            return
        self._reported = now
        self._callback(
            RolloutProgress(
                finished_responses=self._finished, total_responses=self._total, generated_tokens=self._generated
            )
        )


def response_seed(seed: int, prompt_id: str, index: int) -> int:
    """A seed in [0, 2^63) for one response, the same for all parts of it."""
    digest = hashlib.blake2b(f"{seed}\n{index}\n{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _joined(parts: Sequence[GeneratedPart], *, finish_reason: str | None = None) -> Rollout:
    versions: list[tuple[int, int]] = []
    for version, count in itertools.chain.from_iterable(part.policy_versions for part in parts):
        if versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        else:
            versions.append((version, count))
    return Rollout(
        response_ids=np.concatenate([part.token_ids for part in parts]),
        rollout_logprobs=np.concatenate([part.logprobs for part in parts]),
        finish_reason=parts[-1].finish_reason if finish_reason is None else "length",
        policy_versions=tuple(versions),
    )
