"""Responses for curation and evaluation: from any rollout engine, each drawn once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout.engine import ProgressCallback, RolloutCallback, RolloutProgress, SamplingParams
from megatron_klear.rollout.response_cache import ResponseCache, response_key

_HELD = 8
"""Most responses held back while missing ones are collected, in multiples of `chunk_responses`."""


class ResponseSource(Protocol):
    """What the sampler needs of an engine; `LocalEngine` and `SglangEngine` have it."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_responses: int,
        sampling: SamplingParams,
        seed: int,
        on_progress: ProgressCallback | None = None,
        on_rollout: RolloutCallback | None = None,
    ) -> list[RolloutGroup]:
        """Draw responses, telling each as soon as it is complete; see `RolloutEngine.generate`."""
        ...


class CachedSampler:
    """Draws responses through an engine, unless they were drawn before.

    A response depends on the fingerprint of the model, the prompt's tokens, how tokens are drawn, the seed and its
    index, and on nothing else: not on the prompt's id or its neighbours. Prompts of equal tokens share responses.
    Each missing response is a request of its own, so that a kill in the middle of a group costs no finished member.

    Args:
        engine: where missing responses come from.
        cache: where they are kept.
        model: fingerprint of the model that the engine runs.
        sampling: how tokens are drawn.
        seed: of all responses.
        chunk_responses: missing responses that are handed to the engine in one call; that many are in memory.

    Attributes:
        drawn: responses that the engine brought.
        found: responses that the cache had.
    """

    def __init__(
        self,
        engine: ResponseSource,
        cache: ResponseCache,
        *,
        model: str,
        sampling: SamplingParams,
        seed: int,
        chunk_responses: int = 1024,
    ) -> None:
        self._engine, self._cache = engine, cache
        self._model, self._sampling, self._seed = model, sampling, seed
        self._chunk_responses = chunk_responses
        self.drawn = self.found = 0

    def sample(
        self,
        prompts: Iterable[Prompt],
        *,
        num_responses: int,
        on_progress: ProgressCallback | None = None,
        total_prompts: int | None = None,
    ) -> Iterator[RolloutGroup]:
        """Yield the group of each prompt, in order, with `num_responses` responses.

        Args:
            prompts: any number of them; read as they are needed.
            num_responses: M, at least 1.
            on_progress: told how many responses there are so far, found or drawn.
            total_prompts: how many prompts there are, for `on_progress`; by default those read so far.

        Raises:
            RolloutError: the engine cannot serve a request, or the cache cannot be written.
        """
        told = _Told(on_progress, num_responses, total_prompts)
        held: list[tuple[Prompt, list[bytes]]] = []
        missing: dict[bytes, Prompt] = {}
        for prompt in prompts:
            keys = [self._key(prompt, index) for index in range(num_responses)]
            held.append((prompt, keys))
            new = [key for key in dict.fromkeys(keys) if key not in missing and key not in self._cache]
            missing.update((key, prompt) for key in new)
            self.found += len(keys) - len(new)
            told.add_prompt(len(keys) - len(new))
            if len(missing) >= self._chunk_responses or len(held) * num_responses >= _HELD * self._chunk_responses:
                yield from self._complete(held, missing, told)
                held, missing = [], {}
        yield from self._complete(held, missing, told)

    def _complete(
        self, held: Sequence[tuple[Prompt, list[bytes]]], missing: dict[bytes, Prompt], told: _Told
    ) -> Iterator[RolloutGroup]:
        self._draw(missing, told)
        for prompt, keys in held:
            rollouts = tuple(self._stored(key, prompt, told) for key in keys)
            yield RolloutGroup(prompt=prompt, rollouts=rollouts)

    def _draw(self, missing: dict[bytes, Prompt], told: _Told) -> None:
        """Have the engine draw what is missing and keep each response as it comes."""
        requests = [_request(key, prompt) for key, prompt in missing.items()]
        for start in range(0, len(requests), self._chunk_responses):
            told.begin_call()
            self._engine.generate(
                requests[start : start + self._chunk_responses],
                num_responses=1,
                sampling=self._sampling,
                seed=self._seed,
                on_progress=told.progress,
                on_rollout=self._keep,
            )
            told.end_call()

    def _keep(self, request: Prompt, index: int, rollout: Rollout) -> None:
        self._cache.put(bytes.fromhex(request.prompt_id), rollout)
        self.drawn += 1

    def _stored(self, key: bytes, prompt: Prompt, told: _Told) -> Rollout:
        rollout = self._cache.get(key)
        if rollout is None:  # it was damaged between the look and now
            self._draw({key: prompt}, told)
            rollout = self._cache.get(key)
            assert rollout is not None
        return rollout

    def _key(self, prompt: Prompt, index: int) -> bytes:
        return response_key(self._model, prompt.token_ids, self._sampling, seed=self._seed, index=index)


def _request(key: bytes, prompt: Prompt) -> Prompt:
    """A prompt for one response; engines take their randomness from its id, which stands for all it depends on."""
    return Prompt(prompt_id=key.hex(), domain=prompt.domain, token_ids=prompt.token_ids, reference="")


class _Told:
    """Adds up what the engine's calls report, so that progress counts over all of them."""

    def __init__(
        self, callback: Callable[[RolloutProgress], None] | None, num_responses: int, total_prompts: int | None
    ) -> None:
        self._callback, self._num_responses, self._total_prompts = callback, num_responses, total_prompts
        self._prompts = self._finished = self._tokens = 0
        self._last = RolloutProgress(finished_responses=0, total_responses=0, generated_tokens=0)

    def add_prompt(self, found: int) -> None:
        self._prompts += 1
        self._finished += found
        self._report()

    def begin_call(self) -> None:
        self._last = RolloutProgress(finished_responses=0, total_responses=0, generated_tokens=0)

    def progress(self, progress: RolloutProgress) -> None:
        self._last = progress
        self._report()

    def end_call(self) -> None:
        self._finished += self._last.finished_responses
        self._tokens += self._last.generated_tokens
        self.begin_call()

    def _report(self) -> None:
        if self._callback is not None:
            prompts = self._prompts if self._total_prompts is None else self._total_prompts
            self._callback(
                RolloutProgress(
                    finished_responses=self._finished + self._last.finished_responses,
                    total_responses=prompts * self._num_responses,
                    generated_tokens=self._tokens + self._last.generated_tokens,
                )
            )
