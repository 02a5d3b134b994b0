"""Reading SGLang's answers: chunks of a stream, checked, put together to the tokens of one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_klear.records import FinishReason
from megatron_klear.rollout.endpoint import EndpointError, GeneratedPart
from megatron_klear.rollout.sglang.connection import Refused

NO_VERSION = -1
"""Version of weights that no trainer has sent."""

_REFUSED = 400
"""Status of a request that is wrong, wherever it is sent."""

_LEAST_LOGPROB = -float(np.finfo(np.float32).max)
"""What a response holds of one; a request for the least likely token of all does not come near it."""

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class AnswerReader:
    """Takes in the chunks of one request's stream.

    Args:
        engine: its name, in messages.
        vocab_size: tokens must be below it.
        incremental: whether a chunk holds the new tokens only, or all tokens so far.
    """

    def __init__(self, engine: str, *, vocab_size: int, incremental: bool) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._incremental = incremental
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._last: Mapping[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in a chunk.

        Raises:
            EndpointError: it reports an error or is not what the engine should send.
            Refused: it says that the request is wrong. A stream has begun by then, with status 200.
        """
        if "error" in chunk:
            told = chunk["error"]
            if isinstance(told, Mapping) and told.get("code") == _REFUSED:
                raise Refused(_REFUSED, str(told.get("message")))
            raise EndpointError(f"{self._engine}: failed while generating: {chunk['error']}", retry=True)
        try:
            meta = chunk["meta_info"]
            total = int(meta["completion_tokens"])
            pairs = [(int(entry[1]), float(entry[0])) for entry in meta.get("output_token_logprobs") or ()]
            ids = [int(token) for token in chunk["output_ids"]]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise self._malformed(f"{type(error).__name__}: {error}") from error
        new = total - len(self._tokens)
        if new < 0:
            raise self._malformed(f"{total} tokens after {len(self._tokens)}")
        # A request that ends while it waits (aborted, interrupted) repeats what it sent before, in logprobs only.
        whole = not self._incremental or (len(pairs) == total and meta.get("finish_reason") is not None)
        fresh = pairs[len(self._tokens) :] if whole else pairs
        fresh_ids = ids[len(self._tokens) :] if not self._incremental else ids
        if len(fresh) != new:
            raise self._malformed(f"{len(fresh)} logprobs for {new} new tokens")
        if (len(fresh_ids) == new or not whole) and fresh_ids != [token for token, _ in fresh]:
            raise self._malformed("output_ids are not the tokens of output_token_logprobs")
        self._take(fresh)
        self._last = meta

    def _take(self, pairs: list[tuple[int, float]]) -> None:
        for token, logprob in pairs:
            if not 0 <= token < self._vocab_size:
                raise self._malformed(f"token {token} is outside the vocabulary of {self._vocab_size}")
            if not _LEAST_LOGPROB <= logprob <= 1e-3:  # false for NaN, too
                raise self._malformed(
                    f"token {token} has the log-probability {logprob}. Where a single engine says so, start that one "
                    "anew; where all do, the weights have diverged: lower optimizer.lr or optimizer.clip_grad, and "
                    "begin a run with the weights of an older checkpoint (checkpoint.start_from)"
                )
            self._tokens.append(token)
            self._logprobs.append(min(logprob, 0.0))

    def finish(self) -> GeneratedPart:
        """The request's tokens, when its stream has ended.

        Raises:
            EndpointError: it ended without saying why, or for a fault of the engine.
            Refused: it says that the request is wrong.
        """
        reason = None if self._last is None else self._last.get("finish_reason")
        if self._last is None or not isinstance(reason, Mapping):
            raise EndpointError(f"{self._engine}: half a response ({self.num_tokens} tokens, no end)", retry=True)
        kind = _FINISH_REASONS.get(str(reason.get("type")))
        if kind is None:
            raise self._malformed(f"finish_reason {dict(reason)}")
        if kind == "abort" and reason.get("status_code"):
            status = reason["status_code"]
            if status == _REFUSED:
                raise Refused(_REFUSED, str(reason.get("message")))
            raise EndpointError(f"{self._engine}: gave a request up: {reason.get('message')} ({status})", retry=True)
        return GeneratedPart(
            token_ids=np.array(self._tokens, dtype=np.int64),
            logprobs=np.array(self._logprobs, dtype=np.float32),
            finish_reason=kind,
            policy_versions=self._versions(self._last),
        )

    def _versions(self, meta: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """(version, number of tokens) per run of tokens."""
        if not self._tokens:
            return ()
        try:
            spans = meta.get("weight_versions")
            if spans is None:
                return ((parse_version(meta["weight_version"]), len(self._tokens)),)
            found: list[tuple[int, int]] = []
            end = 0
            for span in spans:
                # A response that was interrupted while it waited has lost its last tokens; its spans have not.
                start, stop = int(span["start"]), min(int(span["end"]), len(self._tokens))
                if start != end and stop > start:
                    raise ValueError(f"a span starts at {start} and the one before ends at {end}")
                if stop > start:
                    found.append((parse_version(span["version"]), stop - start))
                    end = stop
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._malformed(f"weight_versions: {error}") from error
        if end != len(self._tokens):
            raise self._malformed(f"weight_versions cover {end} of {len(self._tokens)} tokens")
        return tuple(found)

    def _malformed(self, what: str) -> EndpointError:
        return EndpointError(f"{self._engine}: malformed answer to /generate: {what}", retry=True, malformed=True)


def parse_version(text: object) -> int:
    """The number of a weight version; `NO_VERSION` for weights that no trainer has sent.

    Raises:
        ValueError: neither a number nor SGLang's own name of its first weights.
    """
    return NO_VERSION if text == "default" else int(str(text))
