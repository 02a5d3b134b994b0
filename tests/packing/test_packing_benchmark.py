"""benchmarks/packing_plan.py: its committed figures are of the cases that it measures, and those the README tells."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packing_plan", ROOT / "benchmarks" / "packing_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the annotations of their class
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "packing_plan.json").read_text())
    return found


def test_the_committed_figures_are_of_the_cases_that_are_measured(
    benchmark: ModuleType, measured: dict[str, Any]
) -> None:
    assert [(row["bins_per_step"], row["dp"]) for row in measured["epoch"]] == [
        (bins, dp) for bins, sizes in benchmark.EPOCH_CASES for dp in sizes
    ]
    assert [(row["sequences"], row["dp"], row["cp"]) for row in measured["by_step"]] == list(benchmark.STEP_CASES)


def test_the_readme_tells_the_committed_figures(measured: dict[str, Any]) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    (told,) = [line for line in lines if "`python benchmarks/packing_plan.py`" in line]
    worst = {row["dp"]: row["worst"] for row in measured["epoch"] if row["bins_per_step"] == 128}
    spread = {row["dp"]: row["spread"] for row in measured["by_step"] if (row["sequences"], row["cp"]) == (128, 1)}
    for figure in (
        f"{measured['slots_used']:.2%} of slots used".replace("%", " %"),
        "8, 16 and 32 data parallel ranks within {:.1f}, {:.1f} and {:.1f} %".format(
            *(100 * worst[dp] for dp in (8, 16, 32))
        ),
        f"planned in {measured['plan_cpu_seconds']:.1f} s of one core",
        f"with {measured['planning_bytes'] / 1e6:.0f} MB beside the lengths",
        "8 ranks within {:.1f} %, 16 within {:.1f} %; 32 within {:.1f} %".format(
            *(100 * spread[dp] for dp in (8, 16, 32))
        ),
    ):
        assert figure in told
