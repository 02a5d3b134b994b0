"""A run's own account of its speed, and a trace of its steps, taken through tools/profile.sh on a CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.observe.report import write_report
from megatron_klear.observe.trace import read_trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose bin/python is this interpreter, as KLEAR_VENV names one; there is no nsys in it."""
    folder = tmp_path_factory.mktemp("venv") / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    return folder.parent


def profile(venv: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KLEAR_VENV": str(venv), "KLEAR_PROFILE_DIR": str(out), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tools" / "profile.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_two_recorded_steps_and_their_accounts(
    venv: Path, sft_overrides: Callable[[str], list[str]], tmp_path: Path
) -> None:
    window = ["profile.first_step=2", "profile.num_steps=2", "profile.ranks=[1]"]
    layout = ["parallel.tp=2", "model.recompute=full", "packing.token_budget=512"]
    run = tmp_path / "profiled"
    done = profile(
        venv, run, "--torch", "--processes", "2", "examples/quickstart_sft.yaml",
        *sft_overrides("ignored"), "run.device=cpu", "sft.epochs=null", *window, *layout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps_2_to_3_rank_1.json.gz"
    events = read_trace(trace)
    ranges = {}
    for event in events:
        if event["cat"] == "user_annotation":
            ranges.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {"step 2", "step 3", "train", "microbatch 0 forward", "microbatch 0 backward"} <= set(ranges)
    assert not {"step 1", "step 4"} & set(ranges)
    microbatches = sum(name.startswith("microbatch") and name.endswith("forward") for name in ranges)
    assert microbatches > 1
    for layer in (1, 2):
        # Full recomputation runs every layer forward twice.
        assert len(ranges[f"layer {layer} forward"]) == 2 * len(ranges[f"layer {layer} backward"])
        assert len(ranges[f"layer {layer} backward"]) == 2 * microbatches
    train, (step,) = min(ranges["train"]), ranges["step 2"]
    assert step[0] <= train[0] < train[1] <= step[1]
    for inner in ("microbatch 0 forward", "microbatch 0 backward", "layer 1 forward", "layer 2 backward"):
        assert any(train[0] <= begin < end <= train[1] for begin, end in ranges[inner]), inner
    backward = ranges["microbatch 0 backward"][0]
    inside = [one for one in ranges["layer 1 backward"] if backward[0] <= one[0] and one[1] <= backward[1]]
    assert len(inside) == 1
    products = [e for e in events if e["cat"] == "cpu_op" and e["name"] == "aten::mm"]
    assert any(inside[0][0] <= e["ts"] <= inside[0][1] for e in products), "the layer's gradients are computed in it"
    # Which of them stand at the top depends on the clock, but for the phase that all others are in.
    for shown in (str(trace), "  train\n", "operation (with what it calls)\n"):
        assert shown in done.stdout

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = json.loads((run / "device_rate.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3], "the run ends behind the last recorded step"
    assert kept["processes"] == 2
    for row in rows:
        assert row["throughput/model_tflops"] > 0
        assert row["throughput/mfu"] == pytest.approx(row["throughput/model_tflops"] * 1e12 / kept["flops_per_second"])
        assert "throughput/mfu_datasheet" not in row
        assert 0 < row["throughput/attention_share"] < 0.5
        assert 0.5 < row["packing/slots_used"] <= 1
        assert 0 < row["packing/budget_used"] <= row["packing/slots_used"], "short packs are seen here alone"
        assert 1 <= row["packing/flops_max_over_mean"] < 2, "of two ranks, both with work"
    assert re.search(r"tokens/s \S+  MFU \d+\.\d%", done.stderr)
    page = write_report(run).read_text()
    assert 'id="mfu"' in page
    assert 'id="packing"' in page
    assert 'id="balance"' in page
    assert "Model compute" in page

    again = profile(venv, run, "--torch", "--processes", "2", "examples/quickstart_sft.yaml", *sft_overrides("x"))
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_without_nsys_it_says_so_and_what_to_do(venv: Path, tmp_path: Path) -> None:
    done = profile(venv, tmp_path / "p", "examples/quickstart_sft.yaml")
    assert done.returncode == 2
    assert "nsys is not on PATH" in done.stderr
    assert "tools/profile.sh --torch examples/quickstart_sft.yaml" in done.stderr


def test_what_nsys_is_asked_for(
    venv: Path, sft_overrides: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program of its name that only notes what it is asked: Nsight Systems itself needs a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nsys").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" END >>"{tmp_path}/asked"\n'
        'for word; do [[ $word == --output=* ]] && touch "${word#--output=}.nsys-rep"; done\n'
        '[[ $1 == stats ]] && for line in {1..99}; do echo "row $line of $*"; done; exit 0\n'
    )
    (folder / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    overrides = [*sft_overrides("x"), "profile.first_step=4", "profile.num_steps=3"]
    done = profile(venv, tmp_path / "p", "--processes", "2", "examples/quickstart_sft.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    recorded, ranges, kernels, _ = (tmp_path / "asked").read_text().split("END\n")
    for word in ("profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,osrt",
                 "--nproc-per-node", "2", "megatron_klear.train_sft", "profile.tool=nsys", "sft.steps=6"):  # fmt: skip
        assert word in recorded.splitlines(), word
    assert "nvtx_pushpop_sum" in ranges
    assert "cuda_gpu_kern_sum" in kernels
    assert done.stdout.count("row ") == 2 * 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "CONFIG.yaml: the settings file is missing"),
        (("--entry", "dpo", "a.yaml"), "--entry: got 'dpo', allowed sft, rl"),
        (("--entry",), "--entry: expected sft or rl"),
        (("--steps", "3", "a.yaml"), "--steps: unknown option"),
        (("--torch", "nowhere.yaml"), "no file nowhere.yaml"),
        (("--torch", "--processes", "two", "examples/quickstart_sft.yaml"), "--processes: got 'two'"),
    ],
)
def test_mistakes(venv: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = profile(venv, tmp_path / "p", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", ROOT / "tools" / "profile.sh"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_wrong_settings_are_told_before_anything_runs(
    venv: Path, sft_overrides: Callable[[str], list[str]], tmp_path: Path
) -> None:
    wrong = ["profile.ranks=[0,7]", "profile.num_steps=0"]
    arguments = ["--torch", "--processes", "1", "examples/quickstart_sft.yaml", *sft_overrides("x"), *wrong]
    done = profile(venv, tmp_path / "p", *arguments)
    assert done.returncode == 2
    assert "profile.ranks: got [0, 7], and the run has ranks 0 to 0" in done.stderr
    assert "profile.num_steps: got 0" in done.stderr
    assert not (tmp_path / "p").exists()
