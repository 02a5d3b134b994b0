"""One SGLang server as an `Endpoint`: requests are token ids, answers are tokens with logprobs and versions."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_klear.config.server_options import CONTEXT_MARGIN
from megatron_klear.errors import RolloutError
from megatron_klear.records import FloatArray, IntArray
from megatron_klear.rollout.endpoint import (
    EndpointError,
    GeneratedPart,
    GenerationRequest,
    Silence,
    TokensCallback,
)
from megatron_klear.rollout.sglang.answers import NO_VERSION, AnswerReader, parse_version
from megatron_klear.rollout.sglang.connection import Connection, Refused
from megatron_klear.rollout.sglang.progress import Progress

_LIFE = uuid.uuid4().hex[:12]
"""Names this life of the run: one that is resumed gives the versions after its checkpoint to other weights."""

_ALIVE_SECONDS = 10.0
_ABORT_SECONDS = 10.0


class SglangEndpoint:
    """One server; implements `Endpoint`.

    Args:
        connection: to the server.
        vocab_size: of the model; a token outside it would end a server on a CPU, so none is sent.
        context_length: longest sequence that the server takes, in tokens.
        incremental: whether the server streams new tokens only (its --incremental-streaming-output).
        stream_interval: tokens between two chunks of a stream.
        idle_seconds: longest time without a new token, where the server brings none for others either (`Progress`).
        first_seconds: longest time until the server's first token of all.
        is_in_use: whether the server gets the weights that are published; it is not well otherwise.
        spares_others: have an interruption of all requests leave alone those that did not come this way.
        progress: of the server, shared by all ways to it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        vocab_size: int,
        context_length: int,
        incremental: bool,
        stream_interval: int = 64,
        idle_seconds: float = 600.0,
        first_seconds: float = 0.0,
        is_in_use: Callable[[], bool] = lambda: True,
        spares_others: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.connection = connection
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._incremental = incremental
        self._stream_interval = stream_interval
        self._idle_seconds, self._first_seconds, self._is_in_use = idle_seconds, first_seconds, is_in_use
        self._version = NO_VERSION
        self._spares_others, self._progress = spares_others, progress or Progress()
        self._in_flight: set[str] = set()

    @property
    def name(self) -> str:
        """As in `engine 3 (http://127.0.0.1:30000)`."""
        return self.connection.name

    def use_version(self, version: int) -> None:
        """Have requests from now on share cached prefixes only with those of this life and version of the weights.

        A publish that leaves unfinished responses in place cannot empty the prefix cache, and what old weights computed
        of a prompt would be taken for the new ones': tens of percent off in probability, for a prompt of which no more
        than the first token was seen before.
        """
        self._version = version

    async def generate(self, request: GenerationRequest, on_tokens: TokensCallback | None = None) -> GeneratedPart:
        """Draw the tokens of one request.

        Raises:
            EndpointError: no whole answer came; `retry` says whether the same request may be sent elsewhere.
            RolloutError: the request itself is wrong.
        """
        self._check(request)
        reader = AnswerReader(self.name, vocab_size=self._vocab_size, incremental=self._incremental)
        finished = False
        self._in_flight.add(request.request_id)
        try:
            async with self._progress.limit(self._idle_seconds, self._first_seconds) as brought:
                async for chunk in self.connection.stream("/generate", self._body(request)):
                    before = reader.num_tokens
                    reader.add(chunk)
                    if reader.num_tokens > before:
                        brought()
                        if on_tokens is not None:
                            on_tokens(reader.num_tokens)
            finished = True
            part = reader.finish()
        except TimeoutError as error:
            raise EndpointError(
                f"{self.name}: no new token of request {request.request_id} for {self._idle_seconds:g} s or more "
                f"(sglang.idle_seconds), {reader.num_tokens} tokens in",
                retry=True,
                hangs=self.silence().seconds >= self._idle_seconds,
            ) from error
        except Refused as refusal:
            finished = True
            if refusal.status == 400:
                what = f"request {request.request_id} of {len(request.token_ids)} tokens"
                raise RolloutError(
                    f"{self.name} refuses {what}: {refusal.text}. Another would refuse it, too: look at what its "
                    "server allows (sglang.max_total_tokens, sglang.extra_args; its log, in logs of run.dir where the "
                    "run has started it) and at data.max_prompt_tokens and rollout.max_response_tokens"
                ) from refusal
            raise EndpointError(f"{self.name}: /generate answered {refusal}; is it SGLang?", retry=True) from refusal
        finally:
            self._in_flight.discard(request.request_id)
            if not finished:
                await self._abandon(request.request_id)
        if part.finish_reason == "length" and len(part.token_ids) < request.max_new_tokens:
            raise EndpointError(
                f"{self.name}: ended request {request.request_id} at {len(part.token_ids)} of "
                f"{request.max_new_tokens} tokens; its context or KV cache is too small (sglang.max_total_tokens)",
                retry=False,
            )
        return part

    async def score(self, token_ids: IntArray, *, timeout_seconds: float) -> FloatArray:
        """Log-probability of every token of a sequence given those before it, at temperature 1; entry 0 is 0.

        Args:
            token_ids: int64 [T].
            timeout_seconds: of the answer (weight_sync.timeout_seconds).

        Raises:
            EndpointError: no whole answer.
        """
        body = {
            "input_ids": token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": self._shared(),
        }
        try:
            answer = await self.connection.post(
                "/generate", body, timeout_seconds=timeout_seconds, setting="weight_sync.timeout_seconds"
            )
            entries = answer["meta_info"]["input_token_logprobs"]
            logprobs = np.array([0.0, *(float(entry[0]) for entry in entries[1:])], dtype=np.float32)
        except (Refused, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise EndpointError(f"{self.name}: no logprobs of a given sequence: {error}", retry=False) from error
        if len(logprobs) != len(token_ids):
            raise EndpointError(
                f"{self.name}: {len(logprobs)} logprobs of a sequence of {len(token_ids)} tokens", retry=False
            )
        return logprobs

    async def abort(self, request_id: str | None) -> None:
        """Interrupt a request, None all of them; `generate` then returns what it has, finish reason `abort`."""
        if request_id is None and self._spares_others:
            await asyncio.gather(*(self.abort(own) for own in list(self._in_flight)))
            return
        body = {"rid": "", "abort_all": True} if request_id is None else {"rid": request_id}
        try:
            await self.connection.post_for_text("/abort_request", body, timeout_seconds=_ABORT_SECONDS)
        except Refused as refusal:
            raise EndpointError(f"{self.name}: /abort_request answered {refusal}", retry=False) from refusal

    async def check(self) -> int:
        """Return the version of the weights in use, -1 for those that no trainer has sent.

        Raises:
            EndpointError: it is not alive, or was left out of a publish.
        """
        if not self._is_in_use():
            raise EndpointError(f"{self.name}: it was left out of a publish, where it gave no answer", retry=True)
        # Not /health: that one generates a token, and waits in vain while generation is paused.
        try:
            info = await self.connection.get("/model_info", timeout_seconds=_ALIVE_SECONDS)
            self.use_version(parse_version(info["weight_version"]))
            return self._version
        except (Refused, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"{self.name}: /model_info tells no weight version: {error}", retry=True) from error

    def silence(self) -> Silence:
        """How long the server has brought no token, over all ways to it."""
        return self._progress.silence()

    async def close(self) -> None:
        """Release connections; a second call does nothing."""
        await self.connection.close()

    async def _abandon(self, request_id: str) -> None:
        """Have the server drop a request that nobody waits for; it may be gone itself."""

        async def drop() -> None:
            with contextlib.suppress(EndpointError):
                await self.abort(request_id)

        await asyncio.shield(drop())  # goes on when this is cancelled, and then nobody is left to hear of a failure

    def _shared(self) -> str:
        """Names the requests that may share cached prefixes."""
        return f"version {self._version} of {_LIFE}"

    def _check(self, request: GenerationRequest) -> None:
        """Refuse what would fail on every engine, or end it.

        Raises:
            RolloutError: names the settings.
        """
        ids, problems = request.token_ids, []
        if len(ids) == 0:
            problems.append("it has no tokens")
        elif ids.min() < 0 or ids.max() >= self._vocab_size:
            problems.append(
                f"it holds token ids from {ids.min()} to {ids.max()}, outside the vocabulary of {self._vocab_size} "
                "(tokenizer.dir, model.vocab_size)"
            )
        outside = [token for token in request.sampling.stop_token_ids if not 0 <= token < self._vocab_size]
        if outside:
            problems.append(
                f"stop tokens {outside} are outside the vocabulary of {self._vocab_size} (rollout.stop_tokens)"
            )
        if request.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        elif len(ids) + request.max_new_tokens + CONTEXT_MARGIN > self._context_length:
            problems.append(
                f"{len(ids)} tokens, {request.max_new_tokens} more and a margin of {CONTEXT_MARGIN} exceed the "
                f"engine's context of {self._context_length} (rollout.max_response_tokens, data.max_prompt_tokens)"
            )
        if problems:
            raise RolloutError(f"{self.name} cannot serve request {request.request_id}: " + "; ".join(problems))

    def _body(self, request: GenerationRequest) -> Mapping[str, Any]:
        sampling = request.sampling
        return {
            "rid": request.request_id,
            "input_ids": np.asarray(request.token_ids).tolist(),
            "sampling_params": {
                "max_new_tokens": request.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
                "stop_token_ids": list(sampling.stop_token_ids) or None,
                "sampling_seed": int(request.seed) % 2**63,
                "stream_interval": self._stream_interval,
                "skip_special_tokens": False,
            },
            "extra_key": self._shared(),
            "return_logprob": True,
            "stream": True,
        }
