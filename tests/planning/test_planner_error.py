"""Plans against the device at hand, through benchmarks/planner_error.py: a CPU here, a GPU where there is one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_klear import parallel
from megatron_klear.config import Fp8Settings
from megatron_klear.model.precision import fp8_problems

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planner_error.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planner_error", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_groups() -> Iterator[None]:
    parallel.stop()
    yield
    parallel.stop()


def test_the_benchmark_finds_no_error_in_bytes_on_a_cpu(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = benchmark.run("qwen3-tiny", 1, 64, 1)
    assert list(found["rows"]) == ["none", "selective", "full"]
    for row in found["rows"].values():
        # Two sequences, whose first tokens are not predicted: 32 bytes each that the head does not keep.
        assert row["predicted_bytes"] - row["measured_bytes"] in (64, 60)  # 60: beside a checkpoint's int32
        assert row["measured_seconds"] > 0
    assert capsys.readouterr().out.count("+0.") == 3


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("recipe", ["none", "delayed", "tensorwise", "blockwise"])
def test_a_plan_is_safe_and_useful_on_a_gpu(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], recipe: str, stored: bool
) -> None:
    """Not one byte more than planned above the state, and not half of it for nothing; the error is printed."""
    fp8 = Fp8Settings(recipe=recipe, parameters=stored)  # type: ignore[arg-type]
    if stored and not fp8.on:
        pytest.skip("weights are stored in FP8 with a recipe only")
    if problems := fp8_problems(fp8, torch.device("cuda")):
        pytest.skip("; ".join(problems))
    found = benchmark.run("qwen3-0.6b", 4, 16384, 3, fp8)
    with capsys.disabled():
        print(found)
    for name, row in found["rows"].items():
        assert row["measured_bytes"] <= row["predicted_bytes"] <= 2 * row["measured_bytes"], name
        assert 0 < row["share_of_product_rate"] <= 1, name
