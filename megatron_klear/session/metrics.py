"""Numbers of a step under their metric names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import numpy as np

from megatron_klear.algorithm import REGION_NAMES
from megatron_klear.observe import names
from megatron_klear.records import ScoredGroup
from megatron_klear.reward import count_outcomes
from megatron_klear.trainer import UpdateReport


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Means over the updates of a step (clip regions: over its tokens); nothing when no update was made."""
    if not reports:
        return {}
    tokens = sum(r.predicted_tokens for r in reports)
    values = {
        names.LOSS_TOTAL: float(np.mean([r.loss for r in reports])),
        names.LOSS_LM: float(np.mean([r.lm_loss for r in reports])),
        names.ENTROPY_MEAN: sum(r.entropy * r.predicted_tokens for r in reports) / max(tokens, 1),
        names.OPTIMIZER_LR: reports[-1].lr,
        names.OPTIMIZER_GRAD_NORM: float(np.mean([r.grad_norm for r in reports])),
        names.SLOTS_USED: float(np.mean([r.slots_used for r in reports])),
        names.BUDGET_USED: float(np.mean([r.budget_used for r in reports])),
        names.FLOPS_MAX_OVER_MEAN: float(np.mean([r.flops_max_over_mean for r in reports])),
        "throughput/tokens": float(sum(r.tokens for r in reports)),
    }
    regions = reduce(add, [r.regions for r in reports])
    if regions.sums[8] > 0:
        fractions = regions.fractions()
        values[names.LOSS_POLICY] = float(np.mean([r.policy_loss for r in reports]))
        for region in REGION_NAMES:
            values[f"clip/{region}"] = fractions[f"tokens/{region}"]
            values[f"clip_mass/{region}"] = fractions[f"gradient/{region}"]
    return values


def rollout_metrics(groups: Sequence[ScoredGroup], kept: Sequence[ScoredGroup]) -> dict[str, float]:
    """Outcomes and lengths of a rollout batch, and rewards where any response was graded."""
    rewards = np.concatenate([g.rewards[g.graded] for g in groups])
    graded = sum(int(g.graded.sum()) for g in groups)
    rollouts = [r for g in groups for r in g.group.rollouts]
    lengths = [len(r.response_ids) for r in rollouts]
    counts = count_outcomes(grade for g in groups for grade in g.grades)
    judged = {}
    if graded:  # graders that fail must not look like a policy that does
        judged = {
            names.REWARD_MEAN: float(rewards.mean()),
            names.REWARD_STD: float(rewards.std()),
            names.ACCURACY_TRAIN: sum(int(g.is_correct.sum()) for g in groups) / graded,
        }
    return {
        **judged,
        names.RESPONSE_LENGTH_MEAN: float(np.mean(lengths)),
        names.RESPONSE_LENGTH_MAX: float(max(lengths)),
        names.RESPONSE_TRUNCATED_FRACTION: float(np.mean([r.finish_reason == "length" for r in rollouts])),
        names.FILTER_GROUPS_KEPT: float(len(kept)),
        names.FILTER_GROUPS_TOTAL: float(len(groups)),
        **{names.grades(outcome): float(count) for outcome, count in counts.items()},
    }


def since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """How the counts of a rollout manager went up, and as it stands now what is no count."""
    return {
        name: value if name == names.ENGINES_SERVING else value - before.get(name, 0.0) for name, value in now.items()
    }
