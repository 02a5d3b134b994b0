"""What an update reports (tokens, entropy, clip regions, parts of the loss) in every axis, the same on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.conformance.launch import LaunchResult, run_layouts
from megatron_klear.conformance.matrix import Layout

WORKER = Path(__file__).with_name("reporting_worker.py")

LAYOUTS = (
    Layout(token_budget=64),
    Layout(tp=2, sequence_parallel=True, token_budget=64, temperature=0.7),
    Layout(pp=2, tied=True, token_budget=64),
    Layout(cp=2, token_budget=128),
)


@pytest.fixture(scope="module")
def launched() -> LaunchResult:
    return run_layouts(LAYOUTS, 2, timeout_seconds=300, worker=(str(WORKER),))


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[layout.label(2) for layout in LAYOUTS])
def test_the_report_is_what_loops_over_transformers_count(launched: LaunchResult, number: int) -> None:
    assert launched.failure is None, launched.failure
    row = launched.rows[number]
    assert row.label == LAYOUTS[number].label(2)
    assert row.passed, row
