"""The contract of metric names."""

from __future__ import annotations

import pytest

from megatron_klear.observe import names


def test_every_name_is_described() -> None:
    constants = {
        value
        for name, value in vars(names).items()
        if name.isupper() and isinstance(value, str) and "/" in value and not value.endswith("/")
    }
    assert len(constants) > 25
    assert constants <= set(names.METRICS)
    assert all(metric.meaning for metric in names.METRICS.values())


def test_clip_regions_name_fractions_and_mass() -> None:
    for region in names.CLIP_REGIONS:
        assert f"clip/{region}" in names.METRICS
        assert f"clip_mass/{region}" in names.METRICS


def test_names_that_are_made() -> None:
    assert names.grades("ungraded") == "grades/ungraded"
    assert names.phase_seconds("generate") == "phase_seconds/generate"
    assert names.describe("phase_seconds/generate").unit == "s"
    assert names.describe("my/own").meaning == "my/own"
    assert names.at_turn("engines", "trainer_bytes") in names.METRICS
    with pytest.raises(ValueError, match="device_free_bytes, device_used_bytes"):
        names.at_turn("engines", "bytes")
    with pytest.raises(ValueError, match="correct, wrong, partial, malformed, ungraded"):
        names.grades("right")
