"""benchmarks/train_8b.py: what it does when memory or time run out, and a tiny model; its figures need a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klear.config import PRESETS
from megatron_klear.observe.flops import training_flops

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import train_8b  # noqa: E402
import train_8b_variant  # noqa: E402

NO_TE = "fp8.recipe: got delayed, which needs Transformer Engine, which is not installed here; set fp8.recipe=none"


class Device:
    """A device that holds so many layers of each variant; a whole job takes a minute, a failed one ten seconds.

    Losses fall from 12 by a hundredth a step, those of a variant apart from bf16 by its `drift`.
    """

    def __init__(self, holds: dict[str, int], *, drift: float = 0.0) -> None:
        self.holds, self.drift = holds, drift
        self.now = 0.0
        self.jobs: list[tuple[str, int]] = []
        self.updates: list[int] = []
        self.seconds: list[float] = []
        self.refused: dict[str, tuple[int, str]] = {}
        self.killed: set[str] = set()

    def run(self, job: str, seconds: float) -> tuple[int, dict[str, Any] | None, str]:
        asked = train_8b_variant.Job(**json.loads(job))
        self.jobs.append((asked.variant, asked.layers))
        self.updates.append(asked.updates)
        self.seconds.append(seconds)
        self.now += 10
        if asked.variant in self.refused:
            status, reason = self.refused[asked.variant]
            return status, None, f"a warning\n{reason}"
        if asked.layers > self.holds[asked.variant]:
            return train_8b.NO_MEMORY, None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB"
        self.now += 50 * (asked.warmup + asked.updates) / 53
        count = 7 if asked.variant in self.killed else asked.warmup + asked.updates
        off = 0.0 if asked.variant == "bf16" else self.drift
        result = {
            "layers": asked.layers, "dtype": "bfloat16", "seconds": [2.0] * (count - asked.warmup),
            "losses": [(12 - 0.01 * n) * (1 + off) for n in range(count)],
            "flops": {"projections": 6e14 * asked.layers, "attention": 0.0, "head": 0.0}, "peak_bytes": 1 << 30,
            "attention": "cuDNN", "layer_kind": "te",
        }  # fmt: skip
        return (-9 if asked.variant in self.killed else 0), result, "killed" if asked.variant in self.killed else ""


def run_all(device: Device, *arguments: str, guess: int = 6) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The rows, and what had been saved after every attempt."""
    saved: list[list[Any]] = []
    plan = train_8b.Plan(
        train_8b.parsed(list(arguments)),
        run=device.run,
        save=lambda rows: saved.append(json.loads(json.dumps(rows))),
        clock=lambda: device.now,
    )
    return plan.run_all(guess), saved


def test_a_variant_that_needs_more_memory_takes_fewer_layers_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    device = Device({"bf16": 5, "tensorwise": 3, "blockwise": 3})
    rows, saved = run_all(device, "--variants", "bf16", "tensorwise", "blockwise")
    assert device.jobs == [
        ("bf16", 6), ("bf16", 5),
        ("tensorwise", 5), ("tensorwise", 4), ("tensorwise", 3),
        ("blockwise", 3),
        ("bf16", 3),  # whose losses and rates FP8 is compared with
    ]  # fmt: skip
    assert [(row["variant"], row["layers"], len(row["seconds"])) for row in rows] == [
        ("bf16", 5, 50), ("tensorwise", 3, 50), ("blockwise", 3, 50), ("bf16", 3, 50),
    ]  # fmt: skip
    assert [attempt["layers"] for attempt in rows[1]["attempts"]] == [5, 4]
    assert all("out of memory" in attempt["problem"] for attempt in rows[1]["attempts"])
    assert [row["loss"]["follows_bf16"] for row in rows[1:3]] == [True, True]
    about = {"device": "NVIDIA X", "measured_tflops": 1200.0, "datasheet_bf16_tflops": 1500.0}
    train_8b.rate(rows, about, tokens=1000)
    assert [row["model_tflops"] for row in rows] == pytest.approx([1500, 900, 900, 900])
    assert rows[0]["mfu_datasheet"] == pytest.approx(1.0)
    assert rows[1]["mfu_measured"] == pytest.approx(0.75)
    assert rows[0]["tokens_per_second"] == 500
    train_8b.print_table(rows, about)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("tensorwise ") and "50" in line]
    assert line.split() == ["tensorwise", "3", "50", "2.000", "500", "900", "75.0%", "60.0%", "1.00", "0.00%"]
    assert [line for line in lines if line.startswith("aim")] == [
        "aim, bf16 at 50% of the data sheet (bf16, 5 layers; bf16, 3 layers): reached",
        "aim, FP8 at 700 model TFLOP/s (tensorwise, 3 layers; blockwise, 3 layers): reached",
        "aim, FP8 losses within 1% of bf16 over 50 updates (tensorwise, 3 layers; blockwise, 3 layers): reached",
    ]
    # Every attempt is on disk before the next begins.
    assert [sum(len(row["attempts"]) + bool(row["seconds"]) for row in rows) for rows in saved][:6] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_bad_guess_does_not_cost_an_attempt_for_every_layer() -> None:
    device = Device({"bf16": 9})
    rows, _ = run_all(device, "--variants", "bf16", guess=36)
    assert [layers for _, layers in device.jobs] == [36, 35, 34, 33, 31, 27, 19, 3, 11, 7, 9, 10, 9]
    # What only tells where memory ends takes a few updates; the figures are of all of them.
    assert device.updates == [50] * 4 + [2] * 8 + [50]
    assert (rows[0]["layers"], len(rows[0]["seconds"])) == (9, 50)
    assert "cut_short" not in rows[0]
    assert [a["layers"] for a in rows[0]["attempts"] if a["problem"] == "fits"] == [3, 7, 9]


def test_the_most_layers_that_fit_are_found_from_any_guess() -> None:
    """Against a stand-in for memory, all of them: the search ends where it is full, in a few attempts."""
    for guess in range(1, 41):
        for holds in range(41):
            device = Device({"bf16": holds})
            rows, _ = run_all(device, "--variants", "bf16", "--minutes", "1000", guess=guess)
            most = min(guess, holds)
            if most == 0:
                assert not rows[0]["seconds"]
                continue
            assert (rows[0]["layers"], len(rows[0]["seconds"])) == (most, 50), (guess, holds)
            assert len(device.jobs) <= 4 + 2 * math.ceil(math.log2(guess + 1)) + 1
            tried = [layers for _, layers in device.jobs]
            assert len(set(tried)) >= len(tried) - 1, "no number is tried twice, but for the whole run at the end"


@pytest.mark.parametrize("seconds", [112, 130, 200, 250, 600])
def test_the_search_upwards_keeps_to_the_time(seconds: int) -> None:
    device = Device({"bf16": 9})
    rows, _ = run_all(device, "--variants", "bf16", "--minutes", str(seconds / 60), guess=36)
    # Seven failures and a probe that fits are 83 seconds, a whole run takes 60, and with less than 40 none is begun.
    assert device.now <= max(seconds, 83) + 60
    assert 3 <= rows[0]["layers"] <= 9
    assert rows[0]["seconds"]
    assert len(rows[0]["seconds"]) == (2 if seconds < 123 else 50)
    assert ("a few updates only" in rows[0].get("cut_short", "")) == (seconds < 123)
    assert (rows[0]["layers"] == 9) == (seconds == 600)


def test_what_fits_for_a_few_updates_only_is_followed_by_fewer_layers() -> None:
    """Memory that all updates need and a few do not: the run at the end takes one layer less."""

    class Leaking(Device):
        def run(self, job: str, seconds: float) -> tuple[int, dict[str, Any] | None, str]:
            self.holds = {"bf16": 9 if json.loads(job)["updates"] == 2 else 8}
            return super().run(job, seconds)

    device = Leaking({"bf16": 9})
    rows, _ = run_all(device, "--variants", "bf16", "--minutes", "100", guess=36)
    assert (rows[0]["layers"], len(rows[0]["seconds"])) == (8, 50)
    assert device.jobs[-2:] == [("bf16", 9), ("bf16", 8)]


def test_what_does_not_even_hold_one_layer_has_the_reason() -> None:
    rows, _ = run_all(Device({"bf16": 0}), "--variants", "bf16", "--layers", "2")
    assert rows[0]["problem"].startswith("OutOfMemoryError")
    assert [attempt["layers"] for attempt in rows[0]["attempts"]] == [2, 1]
    assert not rows[0]["seconds"]


def test_what_cannot_run_here_has_its_reason_and_the_others_run() -> None:
    device = Device({"bf16": 6, "tensorwise": 6})
    device.refused = {"delayed": (train_8b_variant.NOT_HERE, NO_TE), "blockwise": (1, "RuntimeError: a kernel failed")}
    rows, _ = run_all(device, "--variants", "bf16", "delayed", "blockwise", "tensorwise")
    assert [row.get("problem") for row in rows] == [None, NO_TE, "RuntimeError: a kernel failed", None]
    assert device.jobs == [("bf16", 6), ("delayed", 6), ("blockwise", 6), ("tensorwise", 6)], "no second try"
    assert "a warning" in rows[1]["log"]


def test_time_is_shared_and_what_is_left_out_is_named() -> None:
    device = Device(dict.fromkeys(train_8b.VARIANTS, 6))
    rows, _ = run_all(device, "--minutes", "4")
    assert device.seconds == [240 / 5, 180 / 4, 120 / 3, 60 / 2]
    assert [row.get("problem") for row in rows] == [None] * 4 + ["no time was left (0 s)"]


def test_a_variant_that_is_killed_keeps_its_updates_and_does_not_pass_for_compared() -> None:
    device = Device({"bf16": 6, "tensorwise": 6})
    device.killed = {"tensorwise"}
    rows, _ = run_all(device, "--variants", "bf16", "tensorwise")
    assert len(rows[1]["seconds"]) == 4
    assert rows[1]["cut_short"] == "killed"
    assert rows[1]["loss"]["updates"] == 7
    assert rows[1]["loss"]["follows_bf16"] is None
    train_8b.rate(rows, {"measured_tflops": 1.0, "datasheet_bf16_tflops": 2000.0}, 1)
    assert list(train_8b.aims(rows).items()) == [
        ("bf16 at 50% of the data sheet (bf16, 6 layers)", True),
        ("FP8 at 700 model TFLOP/s (not told by tensorwise, 6 layers)", None),
        ("FP8 losses within 1% of bf16 over 50 updates (not told by tensorwise, 6 layers)", None),
    ]


def measured_row(
    variant: str = "delayed", *, updates: int = 50, follows: bool | None = True, tflops: float = 800.0
) -> Any:
    row = {"variant": variant, "layers": 6, "seconds": [2.0] * updates, "model_tflops": tflops, "mfu_datasheet": 0.6}
    return {**row, "loss": {"follows_bf16": follows}}


NOT_COMPARED = measured_row("blockwise") | {"loss": {"problem": "bf16 has no losses at 6 layers"}}
NOT_RUN = {"variant": "tensorwise", "layers": 6, "seconds": [], "problem": "RuntimeError: a kernel failed"}


@pytest.mark.parametrize(
    ("rows", "aim"),
    [
        ([measured_row()], True),
        ([measured_row(follows=False)], False),
        ([measured_row(), NOT_COMPARED], None),
        ([measured_row(), NOT_RUN], None),
        ([measured_row(follows=False), NOT_COMPARED, NOT_RUN], False),
        ([NOT_COMPARED], None),
        ([measured_row(), measured_row("blockwise", follows=None)], None),
        ([measured_row("bf16")], None),
    ],
)
def test_losses_that_were_not_compared_are_neither_missed_nor_passed_over(rows: list[Any], aim: bool | None) -> None:
    (name,) = [name for name in train_8b.aims(rows) if "losses" in name]
    assert train_8b.aims(rows)[name] is aim
    for row in rows:
        if row in (NOT_COMPARED, NOT_RUN):
            assert f"not told by {row['variant']}, 6 layers" in name
        elif row["variant"] != "bf16":
            assert f"{row['variant']}, 6 layers" in name


@pytest.mark.parametrize(
    ("rows", "aim"),
    [
        ([measured_row()], True),
        ([measured_row(updates=2)], None),
        ([measured_row(tflops=600.0)], False),
        ([measured_row(tflops=600.0), measured_row("blockwise", updates=2)], None),
        ([measured_row(tflops=600.0), NOT_RUN], None),
        ([measured_row(), measured_row("blockwise", updates=2), NOT_RUN], True),
    ],
)
def test_a_rate_of_a_few_updates_tells_nothing(rows: list[Any], aim: bool | None) -> None:
    (name,) = [name for name in train_8b.aims(rows) if "TFLOP/s" in name]
    assert train_8b.aims(rows)[name] is aim


@pytest.mark.parametrize(("updates", "aim"), [(2, None), (49, None), (50, True)])
def test_so_it_is_with_bf16(updates: int, aim: bool | None) -> None:
    (name,) = [name for name in train_8b.aims([measured_row("bf16", updates=updates)]) if name.startswith("bf16")]
    assert train_8b.aims([measured_row("bf16", updates=updates)])[name] is aim


@pytest.mark.parametrize(("drift", "follows"), [(0.0099, True), (-0.0099, True), (0.0101, False), (math.nan, False)])
def test_losses_within_the_band(drift: float, follows: bool) -> None:
    rows, _ = run_all(Device({"bf16": 6, "delayed": 6}, drift=drift), "--variants", "bf16", "delayed")
    assert rows[1]["loss"]["follows_bf16"] is follows
    assert rows[1]["loss"]["worst_relative_difference"] == pytest.approx(drift, nan_ok=True)
    assert rows[1]["loss"]["band"] == 0.01
    train_8b.rate(rows, {"measured_tflops": 1.0, "datasheet_bf16_tflops": None}, 1)
    *_, aim = train_8b.aims(rows).values()
    assert aim is follows


def test_without_bf16_there_is_nothing_to_compare_with() -> None:
    rows, _ = run_all(Device({"delayed": 6}), "--variants", "delayed")
    assert rows[0]["loss"] == {"problem": "bf16 has no losses at 6 layers"}


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: Exception, wanted: bool) -> None:
    assert train_8b_variant.is_for_want_of_memory(error) is wanted


def test_the_first_guess_grows_with_memory_and_shrinks_with_tokens() -> None:
    def guess(memory: float | None, *arguments: str) -> int:
        return train_8b.layers_that_fit(train_8b.parsed(list(arguments)), memory)

    assert guess(None, "--smoke") == 2
    assert 1 <= guess(80e9) < guess(140e9) < 36
    assert guess(80e9) < guess(80e9, "--tokens", "8192")
    assert guess(80e9) < guess(80e9, "--recompute", "full")
    assert guess(1e9) == 1
    assert guess(1e13) == 36


def test_the_process_is_ended_when_it_does_not_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_8b, "_GRACE_SECONDS", 0.0)
    status, result, _ = train_8b.run_child("device", 0.05)
    assert (status, result) == (-9, None)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # the command must find the project by itself
    command = [sys.executable, str(ROOT / "benchmarks" / "train_8b.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd="/")


def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    variants = ["--variants", "bf16", "blockwise"]
    done = run("--smoke", "--tokens", "96", "--sequences", "3", "--updates", "12", "--warmup", "1", *variants,
               "--recompute", "full", "--out", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    trained, refused = record["rows"]
    assert len(trained["losses"]) == 13
    assert len(trained["seconds"]) == 12
    assert sum(trained["losses"][-4:]) / 4 < trained["losses"][0] - 0.5
    arch = dataclasses.replace(PRESETS["qwen3-tiny"], num_layers=2)
    assert trained["flops"] == dataclasses.asdict(training_flops(arch, [32, 32, 32]))
    assert trained["model_tflops"] * 1e12 == pytest.approx(
        training_flops(arch, [32] * 3).total / trained["median_seconds"]
    )
    assert trained["mfu_measured"] == pytest.approx(trained["model_tflops"] / record["measured_tflops"])
    assert trained["mfu_datasheet"] is None
    assert trained["peak_bytes"] > 2**20
    assert "fp8.recipe: got blockwise, which needs a GPU" in refused["problem"]
    assert {"python", "torch", "megatron-core"} <= set(record["versions"])
    assert set(record["aims"].values()) == {None}
    assert "s left" in done.stdout
    assert "update 2 of 13" in done.stdout
    assert "bf16 (float32)" in done.stdout
    assert refused["problem"] in done.stdout


def test_rows_are_the_same_for_every_variant_and_new_in_every_update() -> None:
    def rows(variant: str, update: int) -> list[Any]:
        job = train_8b_variant.Job(
            variant=variant, layers=2, tokens=96, sequences=3, recompute="none", warmup=0, updates=1, ends_at=0.0,
            smoke=True,
        )  # fmt: skip
        return [(name, ids.tolist(), mask.tolist()) for name, ids, mask in train_8b_variant.text(job, 500, update)]

    assert rows("bf16", 3) == rows("delayed", 3)
    assert rows("bf16", 3) != rows("bf16", 4)
    for _, ids, mask in rows("bf16", 0):
        assert len(ids) == 32
        assert 0 <= min(ids) <= max(ids) < 500
        assert mask == [False] + [True] * 31


def test_without_a_gpu_the_real_thing_is_refused() -> None:
    done = run()
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "--smoke" in done.stderr


def test_arguments_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--updates", "0"], ["--tokens", "4", "--sequences", "3"]):
        with pytest.raises(SystemExit):
            train_8b.parsed(arguments)
        assert arguments[-2] in capsys.readouterr().err
    assert isinstance(train_8b.parsed([]), argparse.Namespace)
