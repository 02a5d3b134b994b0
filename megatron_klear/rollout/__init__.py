"""Rollouts: responses to prompts with the logprobs they were sampled at, from engines behind one interface."""

from __future__ import annotations

from megatron_klear.rollout.engine import ProgressCallback, RolloutEngine, RolloutProgress, SamplingParams
from megatron_klear.rollout.local import LocalEngine
from megatron_klear.rollout.sharding import merge_groups, shard_prompts

__all__ = [
    "LocalEngine",
    "ProgressCallback",
    "RolloutEngine",
    "RolloutProgress",
    "SamplingParams",
    "merge_groups",
    "shard_prompts",
]
