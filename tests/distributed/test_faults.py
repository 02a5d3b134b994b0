"""The comparison notices mistakes: each fault, put into the real code of two ranks, shows in the errors named here."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klear.conformance.launch import LaunchResult, run_layouts
from megatron_klear.conformance.matrix import Layout

WORKER = Path(__file__).with_name("faulty_worker.py")

FAULTS: dict[str, tuple[Layout, set[str]]] = {
    "weights_too_large": (Layout(tp=2), {"loss", "grads", "grad_norm"}),
    "old_logprobs_shifted": (Layout(cp=2), {"loss", "grads", "grad_norm", "updated", "logprobs"}),
    "divided_by_microbatches": (Layout(token_budget=64), {"grads", "grad_norm"}),
    "averaged_over_ranks": (Layout(distributed_optimizer=True, kind="sft"), {"grads", "grad_norm"}),
    "temperature_forgotten": (Layout(pp=2, temperature=0.7), {"loss", "grads", "grad_norm", "updated", "logprobs"}),
    "norms_not_summed": (Layout(tp=2, sequence_parallel=True), {"grads", "updated"}),
    "keys_of_others_without_gradient": (Layout(cp=2, kind="sft"), {"grads", "grad_norm", "updated", "logprobs"}),
    "tied_embedding_not_summed": (Layout(pp=2, tied=True), {"grads", "updated"}),
    "weights_left_on_other_ranks": (Layout(distributed_optimizer=True, overlap=True), {"updated"}),
    "decay_on_norms": (Layout(kind="sft"), {"updated", "logprobs"}),
    "clipping_forgotten": (Layout(tp=2, kind="sft"), {"updated", "logprobs"}),
}


@pytest.fixture(scope="module")
def launched() -> LaunchResult:
    layouts = [layout for layout, _ in FAULTS.values()]
    return run_layouts(layouts, 2, timeout_seconds=540, worker=(str(WORKER), ",".join(FAULTS)))


def test_every_fault_was_put_in(launched: LaunchResult) -> None:
    assert launched.failure is None, launched.failure
    assert len(launched.rows) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed_where_it_should_be(launched: LaunchResult, fault: str) -> None:
    row = launched.rows[list(FAULTS).index(fault)]
    assert not row.passed
    noticed = {name for name, error in row.errors.items() if not error <= 8.0}
    assert noticed >= FAULTS[fault][1], row
