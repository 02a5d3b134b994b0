"""Losses and gradients that are not finite on one rank of several: all refuse, none hangs, nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.conformance.launch import LaunchResult, run_layouts
from megatron_klear.conformance.matrix import Layout

WORKER = Path(__file__).with_name("refusing_worker.py")

LAYOUTS = (
    Layout(token_budget=64),
    Layout(token_budget=64, kind="sft", distributed_optimizer=True, overlap=True),
    Layout(tp=2, sequence_parallel=True, token_budget=64),
    Layout(pp=2, tied=True, token_budget=64),
    Layout(cp=2, token_budget=64, distributed_optimizer=True),
)


@pytest.fixture(scope="module")
def launched() -> LaunchResult:
    return run_layouts(LAYOUTS, 2, timeout_seconds=300, worker=(str(WORKER),))


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[layout.label(2) for layout in LAYOUTS])
def test_refused_by_all_ranks_and_the_next_update_is_as_if_it_had_not_been(launched: LaunchResult, number: int) -> None:
    assert launched.failure is None, launched.failure
    row = launched.rows[number]
    assert row.label == LAYOUTS[number].label(2)
    assert row.passed, row
