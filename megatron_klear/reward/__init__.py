"""Rewards of the answers: math by math-verify in killable processes, code by tests in sandboxes, tags by settings."""

from __future__ import annotations

from megatron_klear.reward.code import CodeGraderPool, grade_code
from megatron_klear.reward.code_tests import BadTestsError, parse_problem
from megatron_klear.reward.math import grade_math
from megatron_klear.reward.rules import AnswerFormat, CodeRewardRules, RewardRules, Verdict, count_outcomes
from megatron_klear.reward.sandbox import Limits, SandboxMode
from megatron_klear.reward.think import ThinkSplit, split_thinking
from megatron_klear.reward.workers import GradeRequest, MathGraderPool

__all__ = [
    "AnswerFormat",
    "BadTestsError",
    "CodeGraderPool",
    "CodeRewardRules",
    "GradeRequest",
    "Limits",
    "MathGraderPool",
    "RewardRules",
    "SandboxMode",
    "ThinkSplit",
    "Verdict",
    "count_outcomes",
    "grade_code",
    "grade_math",
    "parse_problem",
    "split_thinking",
]
