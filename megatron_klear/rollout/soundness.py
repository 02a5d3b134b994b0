"""Judging what an engine answered before any of it is believed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megatron_klear.rollout.endpoint import GeneratedPart, GenerationRequest


def problem_with(
    part: GeneratedPart, request: GenerationRequest, *, vocab_size: int | None, versions: tuple[int, int] | None
) -> str:
    """What is wrong with an answer; empty when nothing is.

    Args:
        part: the answer.
        request: what was asked for.
        vocab_size: number of token ids that there are; None when it is not known.
        versions: oldest and newest version that can have been in use since the request was sent; None for any.
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
    if versions is not None and any(not versions[0] <= version <= versions[1] for version, _ in runs):
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
