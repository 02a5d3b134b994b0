"""Rewards of the answers: math by math-verify in killable worker processes, thinking tags by settings."""

from __future__ import annotations

from megatron_klear.reward.math import grade_math
from megatron_klear.reward.rules import AnswerFormat, RewardRules, count_outcomes
from megatron_klear.reward.think import ThinkSplit, split_thinking
from megatron_klear.reward.workers import GradeRequest, MathGraderPool

__all__ = [
    "AnswerFormat",
    "GradeRequest",
    "MathGraderPool",
    "RewardRules",
    "ThinkSplit",
    "count_outcomes",
    "grade_math",
    "split_thinking",
]
