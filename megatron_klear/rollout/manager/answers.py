"""Judging what an engine answered before any of it is believed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron_klear.records import Rollout
from megatron_klear.rollout.endpoint import GeneratedPart, GenerationRequest
from megatron_klear.rollout.ledger.entries import join_versions


def problem_with(
    part: GeneratedPart, request: GenerationRequest, *, vocab_size: int | None, versions: tuple[int, int]
) -> str:
    """What is wrong with an answer; empty when nothing is.

    Args:
        part: the answer.
        request: what was asked for.
        vocab_size: number of token ids that there are; None when it is not known.
        versions: oldest and newest version that can have been in use since the request was sent.
    """
    tokens, logprobs, runs = part.token_ids, part.logprobs, part.policy_versions
    length = len(tokens)
    if len(logprobs) != length:
        return f"{length} tokens came with {len(logprobs)} logprobs"
    if length > request.max_new_tokens:
        return f"{length} tokens came where {request.max_new_tokens} were allowed"
    if length and not np.isfinite(logprobs).all():
        return "a logprob is not finite"
    if length and logprobs.max() > 1e-3:  # float32 rounds a probability of 1 to a little above 0
        return f"a logprob is {float(logprobs.max()):.4g}, above 0"
    if length and (tokens.min() < 0 or (vocab_size is not None and tokens.max() >= vocab_size)):
        return f"token ids from {tokens.min()} to {tokens.max()} came, and the vocabulary has {vocab_size}"
    if sum(count for _, count in runs) != length or any(count < 1 for _, count in runs):
        return f"its versions {runs} do not cover {length} tokens"
    if any(not versions[0] <= version <= versions[1] for version, _ in runs):
        return f"its versions {runs} are not from {versions[0]} to {versions[1]}, which were in use"
    if any(later[0] <= earlier[0] for earlier, later in pairwise(runs)):
        return f"its versions {runs} do not go up"
    if part.finish_reason == "length" and length < request.max_new_tokens:
        return f"it ends for its length at {length} of {request.max_new_tokens} tokens"
    if part.finish_reason == "stop" and (length == 0 or int(tokens[-1]) not in request.sampling.stop_token_ids):
        return "it ends with a stop, but not with a stop token"
    if part.finish_reason not in ("stop", "length", "abort"):
        return f"its finish reason is {part.finish_reason!r}"
    return ""


def extended(head: Rollout | None, part: GeneratedPart, *, is_full: bool) -> Rollout:
    """A response with the tokens of one more request behind those it has.

    Args:
        head: what it has; None before the first request.
        part: what the request brought.
        is_full: the token budget is used up, so that an interruption at that very token is an end.
    """
    finish = "length" if part.finish_reason == "abort" and is_full else part.finish_reason
    if head is None:
        head = Rollout(
            response_ids=np.empty(0, np.int64),
            rollout_logprobs=np.empty(0, np.float32),
            finish_reason="abort",
            policy_versions=(),
        )
    return Rollout(
        response_ids=np.concatenate([head.response_ids, np.asarray(part.token_ids, np.int64)]),
        rollout_logprobs=np.concatenate([head.rollout_logprobs, np.asarray(part.logprobs, np.float32)]),
        finish_reason=finish,
        policy_versions=join_versions(head.policy_versions, part.policy_versions),
    )


def cut_to_length(rollout: Rollout, budget: int) -> Rollout:
    """A response as it would have ended under a token budget that it fills or exceeds.

    Args:
        rollout: of at least `budget` tokens.
        budget: most tokens of a response.
    """
    runs, left = [], budget
    for version, count in rollout.policy_versions:
        if left > 0:
            runs.append((version, min(count, left)))
        left -= count
    return Rollout(
        response_ids=np.ascontiguousarray(rollout.response_ids[:budget]),
        rollout_logprobs=np.ascontiguousarray(rollout.rollout_logprobs[:budget]),
        finish_reason="length",
        policy_versions=tuple(runs),
    )
