"""Responses with what one more answer adds to them, or cut to a budget."""

from __future__ import annotations

import numpy as np

from megatron_klear.records import Rollout
from megatron_klear.rollout.endpoint import GeneratedPart
from megatron_klear.rollout.ledger.entries import join_versions


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
