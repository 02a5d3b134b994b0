"""What the rollout manager needs of one serving engine, wherever it runs.

An endpoint serves one request at a time per call, many calls at once; all of it is asyncio, so that one process
can hold tens of thousands of requests in flight. Tokens are the truth: requests and answers never travel as text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_klear.errors import RolloutError
from megatron_klear.records import FinishReason, FloatArray, IntArray
from megatron_klear.rollout.engine import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """One response to draw, or to continue.

    Attributes:
        request_id: unique over the life of the run; a retry or a continuation gets a new one.
        token_ids: int64 [L], the prompt, followed by what an interrupted response had already.
        max_new_tokens: tokens still allowed; a continuation's budget is what the first part left over.
        sampling: how tokens are drawn; its `max_response_tokens` is the budget of the whole response.
        seed: of the whole response, the same when it is continued or asked for again. An engine that takes one draws
            each token by the seed and the token's place in the sequence.
    """

    request_id: str
    token_ids: IntArray
    max_new_tokens: int
    sampling: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GeneratedPart:
    """The tokens that one request brought.

    Attributes:
        token_ids: int64 [L], new tokens only, the end token included.
        logprobs: float32 [L], each token's log-probability at the sampling temperature over the whole vocabulary.
        finish_reason: `abort` when interrupted: the part is good and can be continued.
        policy_versions: (version, number of tokens) per run of tokens, in order; tokens sum to L.
    """

    token_ids: IntArray
    logprobs: FloatArray
    finish_reason: FinishReason
    policy_versions: tuple[tuple[int, int], ...]


TokensCallback = Callable[[int], None]
"""Called with the number of tokens a request has so far; the manager tells slow from hung by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """How long an engine has brought no token to anybody of this process.

    Attributes:
        seconds: while requests wait, or since one was given up for that; 0 otherwise.
        is_first: it has brought none since it was started, and may be compiling.
    """

    seconds: float
    is_first: bool


class EndpointError(RolloutError):
    """An engine gave no whole answer.

    Args:
        message: names the engine and what happened.
        retry: whether the same request may be sent to another engine; false where another would fail alike.
        malformed: an answer came, and cannot be right.
        hangs: the engine brings no token to anybody, whatever else it answers.
    """

    def __init__(self, message: str, *, retry: bool, malformed: bool = False, hangs: bool = False) -> None:
        self.retry, self.malformed, self.hangs = retry, malformed, hangs
        super().__init__(message)


class Endpoint(Protocol):
    """One serving engine."""

    @property
    def name(self) -> str:
        """Names the engine in logs and messages, as in `engine 3 (http://127.0.0.1:30000)`."""
        ...

    async def generate(self, request: GenerationRequest, on_tokens: TokensCallback | None = None) -> GeneratedPart:
        """Draw the tokens of one request.

        Raises:
            EndpointError: no whole answer came. `retry` says whether the same request may be sent elsewhere.
            RolloutError: the request itself is wrong (too long, tokens outside the vocabulary).
        """
        ...

    async def abort(self, request_id: str | None) -> None:
        """Interrupt a request, None all of them; `generate` then returns what it has, finish reason `abort`."""
        ...

    async def check(self) -> int:
        """Return the version of the weights in use; answers at once while the engine is alive, paused or not.

        Raises:
            EndpointError: it is not alive.
        """
        ...

    def silence(self) -> Silence:
        """How long the engine has brought no token, over all ways to it; may be asked from any thread."""
        ...

    async def close(self) -> None:
        """Release connections; a second call does nothing."""
        ...
