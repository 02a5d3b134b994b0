"""Every layout against transformers in float64: real gloo processes, judged here on the numbers that they report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_klear.conformance.compare import architecture, compute_reference
from megatron_klear.conformance.launch import LaunchResult, plan_launches, run_layouts
from megatron_klear.conformance.matrix import LAYOUTS, Layout
from megatron_klear.model.layer_spec import transformer_engine_is_there
from megatron_klear.packing import plan_packs, sequence_multiple

LARGEST_ERROR = 8.0
ROWS = {1: 10, 2: 13, 4: 21}


@pytest.fixture(scope="module")
def launched() -> Callable[[int], LaunchResult]:
    """The result of the launch with so many processes, started once."""
    results: dict[int, LaunchResult] = {}

    def launch(processes: int) -> LaunchResult:
        if processes not in results:
            results[processes] = run_layouts(LAYOUTS[processes], processes, timeout_seconds=540)
        return results[processes]

    return launch


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_layouts_ran_in_order(launched: Callable[[int], LaunchResult], processes: int) -> None:
    result = launched(processes)
    assert result.failure is None, result.failure
    assert [row.label for row in result.rows] == [layout.label(processes) for layout in LAYOUTS[processes]]
    assert len(result.rows) == ROWS[processes]
    assert {row.processes for row in result.rows} == {processes}


@pytest.mark.parametrize(
    ("processes", "number"),
    [pytest.param(n, i, id=f"{n}: {layout.label(n)}") for n, rows in LAYOUTS.items() for i, layout in enumerate(rows)],
)
def test_layout_computes_what_one_process_does(
    launched: Callable[[int], LaunchResult], processes: int, number: int
) -> None:
    row = launched(processes).rows[number]
    errors = np.array([row.loss, row.logprobs, row.grads, row.grad_norm, row.updated])
    assert np.all(np.isfinite(errors)), row
    assert np.all(errors <= LARGEST_ERROR), row
    assert errors.max() > 0, f"nothing differs from float64 at all, so nothing was compared: {row}"
    assert row.passed


@pytest.mark.gpu
def test_layouts_hold_on_as_many_gpus_as_there_are() -> None:
    """NCCL, bfloat16 and float32, and Transformer Engine's layers where it is installed."""
    launches = plan_launches(
        [n for n in LAYOUTS if n <= torch.cuda.device_count()],
        "cuda",
        num_gpus=torch.cuda.device_count(),
        transformer_engine=transformer_engine_is_there(),
    )
    assert launches
    for launch in launches:
        result = run_layouts(launch.layouts, launch.processes, device="cuda", timeout_seconds=900)
        assert result.failure is None, result.failure
        assert len(result.rows) == len(launch.layouts)
        assert {row.device for row in result.rows} == {"cuda"}
        assert not [row for row in result.rows if not row.passed]


def _all() -> list[tuple[int, Layout]]:
    return [(n, layout) for n, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "dp", "sp"])
def test_every_axis_is_in_the_matrix_for_both_losses(axis: str, kind: str) -> None:
    sizes = {
        "tp": lambda n, layout: layout.tp,
        "pp": lambda n, layout: layout.pp,
        "cp": lambda n, layout: layout.cp,
        "dp": lambda n, layout: layout.dp(n),
        "sp": lambda n, layout: layout.tp if layout.sequence_parallel else 1,
    }[axis]
    found = {sizes(n, layout) for n, layout in _all() if layout.kind == kind}
    assert {1, 2} <= found
    assert axis == "sp" or any(size == 4 for n, layout in _all() for size in [sizes(n, layout)])


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_every_pair_of_axes_is_in_the_matrix_for_both_losses(kind: str) -> None:
    pairs = {
        (a, b)
        for n, layout in _all()
        if layout.kind == kind
        for a, first in {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": layout.dp(n)}.items()
        for b, second in {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": layout.dp(n)}.items()
        if a < b and first > 1 and second > 1
    }
    assert pairs == {("pp", "tp"), ("cp", "tp"), ("dp", "tp"), ("cp", "pp"), ("dp", "pp"), ("cp", "dp")}


def test_the_matrix_has_every_option() -> None:
    for option, values in {
        "recompute": {"none", "selective", "full"},
        "objective": {"gppo", "clip", "cispo"},
        "dtype": {"float32", "bfloat16"},
        "tied": {True, False},
        "distributed_optimizer": {True, False},
        "overlap": {True, False},
    }.items():
        assert {getattr(layout, option) for _, layout in _all()} >= values, option
    assert any(layout.temperature != 1.0 for _, layout in _all())
    assert any(len(layout.lengths) < layout.dp(n) for n, layout in _all()), "no rank without sequences"
    assert len({layout for n, layout in _all() if n == 4}) == ROWS[4]


def test_the_matrix_splits_into_one_and_into_many_microbatches() -> None:
    counts = {
        plan_packs(
            layout.lengths,
            token_budget=layout.token_budget,
            dp_size=layout.dp(n),
            multiple=sequence_multiple(layout.cp),
        ).num_microbatches
        for n, layout in _all()
    }
    assert min(counts) == 1
    assert max(counts) >= 4


@pytest.mark.parametrize(("dtype", "cost"), [("float32", 2e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_the_unit_of_errors_is_small(kind: str, dtype: str, cost: float) -> None:
    """Multiples of the data type's own error mean nothing if that is large; and it must not be 0."""
    reference = compute_reference(Layout(kind=kind, dtype=dtype))
    exact, plain = reference.exact, reference.plain
    for found, wanted in ((plain.grads, exact.grads), (plain.updated, exact.updated)):
        assert set(found) == set(wanted)
        whole = torch.cat([wanted[name].flatten() for name in wanted])
        error = torch.cat([(found[name].double() - wanted[name]).flatten() for name in wanted])
        assert 0 < float(error.norm() / whole.norm()) < cost
    assert abs(plain.loss - exact.loss) / exact.loss_terms < cost
    for found_logprobs, wanted_logprobs in zip(plain.logprobs, exact.logprobs, strict=True):
        assert np.abs(found_logprobs - wanted_logprobs).max() < 3 * cost
    assert exact.grad_norm > 0.5, "clipping would take no part"


def test_the_reference_has_ratios_in_all_clip_regions_and_a_gradient_everywhere() -> None:
    reference = compute_reference(Layout())
    sequences, exact = reference.sequences, reference.exact
    ratios, signs = [], []
    for sequence, logprobs in zip(sequences, exact.logprobs, strict=True):
        trained = sequence.policy_weight != 0
        ratios.append(np.exp(logprobs - sequence.old_logprobs)[trained])
        signs.append(np.sign(sequence.advantages)[trained])
    ratio, sign = np.concatenate(ratios), np.concatenate(signs)
    for region in (ratio < 0.8, ratio > 1.28, (ratio > 0.8) & (ratio < 1.28)):
        assert (region & (sign > 0)).sum() >= 5
        assert (region & (sign < 0)).sum() >= 5
    assert all(float(gradient.norm()) > 0 for gradient in exact.grads.values())
    # q, k, v, o, two of the MLP in, one out, four norms per layer; embedding, final norm, head.
    assert len(exact.grads) == 11 * architecture(False).num_layers + 3
