"""benchmarks/train_8b.py on a tiny model: that it trains, counts and writes; its figures need a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.config import PRESETS
from megatron_klear.observe.flops import training_flops

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "train_8b.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    variants = ["--variants", "bf16", "blockwise"]
    done = run("--smoke", "--tokens", "96", "--sequences", "3", "--updates", "2", "--warmup", "1", *variants,
               "--recompute", "full", "--out", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    trained, refused = record["rows"]
    assert len(trained["losses"]) == 3
    assert trained["losses"][-1] < trained["losses"][0]
    arch = dataclasses.replace(PRESETS["qwen3-tiny"], num_layers=2)
    assert trained["flops"] == dataclasses.asdict(training_flops(arch, [32, 32, 32]))
    rate = training_flops(arch, [32] * 3).total / (sum(trained["seconds"]) / 2)
    assert trained["model_tflops"] * 1e12 == pytest.approx(rate)
    assert trained["mfu_measured"] == pytest.approx(trained["model_tflops"] / record["measured_tflops"])
    assert trained["mfu_datasheet"] is None
    assert trained["peak_bytes"] > 2**20
    assert "fp8.recipe: got blockwise, which needs a GPU" in refused["problem"]
    assert {"python", "torch", "megatron-core"} <= set(record["versions"])
    assert "bf16 (float32)" in done.stdout
    assert refused["problem"] in done.stdout


def test_without_a_gpu_the_real_thing_is_refused() -> None:
    done = run()
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--smoke" in done.stderr
