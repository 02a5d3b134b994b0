"""Rollouts: responses to prompts with the logprobs they were sampled at, from engines behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_klear.rollout.engine import (
    ProgressCallback,
    RolloutCallback,
    RolloutEngine,
    RolloutProgress,
    SamplingParams,
)
from megatron_klear.rollout.sharding import merge_groups, shard_prompts

if TYPE_CHECKING:
    from megatron_klear.rollout.local import LocalEngine

__all__ = [
    "LocalEngine",
    "ProgressCallback",
    "RolloutCallback",
    "RolloutEngine",
    "RolloutProgress",
    "SamplingParams",
    "merge_groups",
    "shard_prompts",
]


def __getattr__(name: str) -> Any:
    """Import the in-process engine when it is asked for: reading a ledger must not wait for transformers."""
    if name == "LocalEngine":
        from megatron_klear.rollout.local import LocalEngine

        return LocalEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
