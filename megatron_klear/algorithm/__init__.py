"""The paper's algorithms, one file per group of equations; tensors in, tensors out.

Nothing here averages: losses are per token, and every mask and denominator is a weight from `token_weights`,
made before the forward pass. The training loss is the plain sum of weight times token loss.
"""

from __future__ import annotations

from megatron_klear.algorithm.advantages import group_advantages
from megatron_klear.algorithm.cispo import cispo_gradient_scale, cispo_token_loss
from megatron_klear.algorithm.clip import clip_gradient_scale, clip_ratio, clip_token_loss
from megatron_klear.algorithm.divergence import RolloutDivergence, rollout_divergence
from megatron_klear.algorithm.filter import zero_advantage_mask
from megatron_klear.algorithm.generalized_advantages import generalized_advantages
from megatron_klear.algorithm.gppo import gppo_gradient_scale, gppo_token_loss
from megatron_klear.algorithm.joint import joint_objective
from megatron_klear.algorithm.language_model import lm_token_loss
from megatron_klear.algorithm.objective import (
    ObjectiveKind,
    PolicyObjective,
    policy_token_loss,
    policy_value_and_scale,
)
from megatron_klear.algorithm.off_policy import (
    CorrectionKind,
    OffPolicyCorrection,
    OffPolicyStats,
    SequenceRatio,
    off_policy_weights,
)
from megatron_klear.algorithm.ratio import importance_ratio
from megatron_klear.algorithm.regions import REGION_NAMES, ClipRegions, clip_region_fractions, clip_regions
from megatron_klear.algorithm.token_weights import (
    PolicyNormalizer,
    SftNormalizer,
    batch_token_weights,
    group_token_weights,
    lm_token_weights,
    masked_token_weights,
    policy_token_weights,
    sequence_token_weights,
    sft_token_weights,
)

__all__ = [
    "REGION_NAMES",
    "ClipRegions",
    "CorrectionKind",
    "ObjectiveKind",
    "OffPolicyCorrection",
    "OffPolicyStats",
    "PolicyNormalizer",
    "PolicyObjective",
    "RolloutDivergence",
    "SequenceRatio",
    "SftNormalizer",
    "batch_token_weights",
    "cispo_gradient_scale",
    "cispo_token_loss",
    "clip_gradient_scale",
    "clip_ratio",
    "clip_region_fractions",
    "clip_regions",
    "clip_token_loss",
    "generalized_advantages",
    "gppo_gradient_scale",
    "gppo_token_loss",
    "group_advantages",
    "group_token_weights",
    "importance_ratio",
    "joint_objective",
    "lm_token_loss",
    "lm_token_weights",
    "masked_token_weights",
    "off_policy_weights",
    "policy_token_loss",
    "policy_token_weights",
    "policy_value_and_scale",
    "rollout_divergence",
    "sequence_token_weights",
    "sft_token_weights",
    "zero_advantage_mask",
]
