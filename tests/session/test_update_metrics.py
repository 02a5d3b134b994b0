"""Numbers of a step's updates, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_klear.algorithm import ClipRegions
from megatron_klear.observe import names
from megatron_klear.session.metrics import update_metrics
from megatron_klear.trainer import UpdateReport


def report(**changes: Any) -> UpdateReport:
    values: dict[str, Any] = {
        "loss": 1.0, "policy_loss": 0.25, "lm_loss": 0.75, "grad_norm": 2.0, "lr": 1e-3, "tokens": 100,
        "predicted_tokens": 60, "entropy": 0.5, "microbatches": 1, "slots_used": 0.9, "budget_used": 0.5,
        "flops_max_over_mean": 1.25,
        "regions": ClipRegions(torch.tensor([1, 2, 3, 4, 0.1, 0.2, 0.3, 0.4, 50, 2.0], dtype=torch.float64)),
    }  # fmt: skip
    return UpdateReport(**(values | changes))


def test_a_steps_updates() -> None:
    nothing_beyond = ClipRegions(torch.tensor([0] * 8 + [50, 3.0], dtype=torch.float64))
    second = report(
        loss=3.0, policy_loss=1.0, lm_loss=2.0, grad_norm=4.0, lr=5e-4, tokens=300, predicted_tokens=20, entropy=1.5,
        slots_used=0.7, budget_used=0.25, flops_max_over_mean=1.75, regions=nothing_beyond,
    )  # fmt: skip
    found = update_metrics([report(), second])
    assert found[names.LOSS_TOTAL] == 2.0
    assert found[names.LOSS_POLICY] == 0.625
    assert found[names.LOSS_LM] == 1.375
    assert found[names.ENTROPY_MEAN] == pytest.approx((0.5 * 60 + 1.5 * 20) / 80), "a mean over tokens"
    assert found[names.OPTIMIZER_LR] == 5e-4
    assert found[names.OPTIMIZER_GRAD_NORM] == 3.0
    assert found[names.SLOTS_USED] == pytest.approx(0.8)
    assert found[names.BUDGET_USED] == 0.375
    assert found[names.FLOPS_MAX_OVER_MEAN] == 1.5
    assert found["throughput/tokens"] == 400
    assert [found[f"clip/{region}"] for region in names.CLIP_REGIONS] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert [found[f"clip_mass/{region}"] for region in names.CLIP_REGIONS] == pytest.approx([0.02, 0.04, 0.06, 0.08])


def test_sft_has_no_policy_and_a_step_without_updates_has_nothing() -> None:
    found = update_metrics([report(regions=ClipRegions(torch.zeros(10, dtype=torch.float64)))])
    assert names.LOSS_POLICY not in found
    assert not [name for name in found if name.startswith("clip")]
    assert update_metrics([]) == {}
