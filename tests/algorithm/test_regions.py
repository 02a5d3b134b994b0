"""Region diagnostics against a count by hand and against slices added up."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_klear.algorithm import REGION_NAMES, ClipRegions, PolicyObjective, clip_region_fractions, clip_regions

RATIOS = torch.tensor([0.5, 0.5, 2.0, 2.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, -3.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
OLD = torch.full_like(RATIOS, -2.0)


def test_by_hand() -> None:
    result = clip_region_fractions(RATIOS.log() + OLD, OLD, ADVANTAGES, WEIGHT, PolicyObjective("gppo"))
    mass = 0.5 + 0.8 + 1.28 + 2.0 + 1.0 + 1.0
    assert {name: result[f"tokens/{name}"] for name in REGION_NAMES} == dict.fromkeys(
        REGION_NAMES, pytest.approx(1 / 7)
    )
    assert result["gradient/low_positive"] == pytest.approx(0.5 / mass)
    assert result["gradient/low_negative"] == pytest.approx(0.8 / mass)
    assert result["gradient/high_positive"] == pytest.approx(1.28 / mass)
    assert result["gradient/high_negative"] == pytest.approx(2.0 / mass)


def test_clip_has_no_gradient_where_it_binds_and_gppo_has() -> None:
    arguments = (RATIOS.log() + OLD, OLD, ADVANTAGES, WEIGHT)
    clip, gppo = (clip_region_fractions(*arguments, PolicyObjective(kind)) for kind in ("clip", "gppo"))
    for name in ("low_negative", "high_positive"):
        assert clip[f"gradient/{name}"] == 0.0
        assert gppo[f"gradient/{name}"] > 0.0
        assert clip[f"tokens/{name}"] == gppo[f"tokens/{name}"]


def test_pieces_add_up_to_the_whole() -> None:
    rng = torch.Generator().manual_seed(9)
    new, old, advantages = (torch.randn(100, generator=rng) for _ in range(3))
    weight = torch.rand(100, generator=rng)
    objective = PolicyObjective("gppo", beta_low=0.5)
    whole = clip_regions(new, old, advantages, weight, objective)
    pieces = [
        clip_regions(new[part], old[part], advantages[part], weight[part], objective)
        for part in (slice(0, 7), slice(7, 7), slice(7, 60), slice(60, 100))
    ]
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    assert isinstance(total, ClipRegions)
    torch.testing.assert_close(total.sums, whole.sums, rtol=1e-12, atol=0)
    assert sum(whole.fractions()[f"tokens/{name}"] for name in REGION_NAMES) <= 1.0


def test_ignored_positions_may_hold_anything() -> None:
    new, old = torch.tensor([0.0, math.nan, -1.0]), torch.tensor([0.0, 0.0, math.nan])
    result = clip_region_fractions(new, old, torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), PolicyObjective())
    assert all(math.isfinite(value) for value in result.values())


def test_nothing_counted_gives_zeros() -> None:
    zeros = torch.zeros(4)
    assert set(clip_region_fractions(zeros, zeros, zeros, zeros, PolicyObjective()).values()) == {0.0}
