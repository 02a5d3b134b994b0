"""metrics.jsonl and TensorBoard: what is written is read back, whatever a kill left behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_klear.observe.examples import append_examples, read_examples
from megatron_klear.observe.jsonl import JsonLinesFile, keep_through_step, read_json_lines
from megatron_klear.observe.metrics import METRICS_FILE, MetricsWriter, SilentMetrics, open_metrics, read_metrics


def steps_of(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_every_line_is_strict_json_with_the_common_fields(tmp_path: Path) -> None:
    before = time.time()
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(1, "rl", {"reward/mean": 0.5, "filter/groups_kept": 3})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    row = json.loads(line)
    assert row.pop("time") == pytest.approx(time.time(), abs=time.time() - before + 1)
    assert row == {"step": 1, "phase": "rl", "reward/mean": 0.5, "filter/groups_kept": 3}


def test_lines_can_be_read_before_the_writer_is_closed(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    metrics.log(1, "sft", {"loss/total": 2.0})
    assert read_metrics(tmp_path)[0]["loss/total"] == 2.0
    metrics.close()
    metrics.close()


def test_values_that_are_not_finite_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(1, "sft", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert (raw["a"], raw["b"], raw["c"], raw["d"]) == ("nan", "inf", "-inf", 1.0)
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_numpy_and_torch_scalars_are_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        numbers = {"a": np.float32(0.25), "b": np.int64(7), "c": torch.tensor(1.5), "d": np.float64("nan"), "e": True}
        metrics.log(1, "sft", numbers)
    (row,) = read_metrics(tmp_path)
    assert (row["a"], row["b"], row["c"], row["e"]) == (0.25, 7, 1.5, 1)
    assert math.isnan(row["d"])


@pytest.mark.parametrize(
    ("phase", "values", "named"),
    [
        ("train", {}, "train"),
        ("sft", {"step": 1}, "step"),
        ("sft", {"loss/total": "high"}, "loss/total"),
        ("sft", {"loss/total": None}, "loss/total"),
    ],
)
def test_what_is_not_a_metric_is_refused_and_nothing_is_written(tmp_path, phase, values, named) -> None:
    with (
        MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics,
        pytest.raises(ValueError, match=named),
    ):
        metrics.log(1, phase, values)
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    example = {
        "prompt_id": "p", "prompt": "1+1", "reference": "2", "response": "2", "outcome": "correct", "reward": 1.0,
        "reason": "", "finish_reason": "stop",
    }  # fmt: skip
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(0, "eval", {"accuracy/heldout": 0.1})
        for step in range(1, 8):
            metrics.log(step, "rl", {"reward/mean": step / 10})
            append_examples(tmp_path, [{"step": step, **example}])
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=4) as metrics:
        assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
        assert [row["step"] for row in read_examples(tmp_path)] == [1, 2, 3, 4]
        metrics.log(5, "rl", {"reward/mean": 9.0})
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["reward/mean"] == 9.0


def test_a_half_written_last_line_is_left_out_and_cleaned_up_on_resume(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(1, "sft", {"loss/total": 1.0})
        metrics.log(2, "sft", {"loss/total": 0.5})
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + '{"step": 3, "phase": "sft", "note": "é'.encode()[:-1])
    assert steps_of(tmp_path) == [1, 2]
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=2) as metrics:
        metrics.log(3, "sft", {"loss/total": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "phase": "sft"}\n{"step": 2, "phase": "sft"}')
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=2) as metrics:
        metrics.log(3, "sft", {})
    assert steps_of(tmp_path) == [1, 2, 3]


def test_damaged_lines_in_the_middle_are_left_out_with_a_warning(tmp_path, caplog) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "phase": "sft"}\n\x00\x00\x00\n[1]\n{"step": 2, "phase": "sft"}\n{"step"')
    assert steps_of(tmp_path) == [1, 2]
    assert "2 damaged lines" in caplog.text


def test_starting_anew_keeps_the_earlier_file_under_another_name(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
            metrics.log(1, "sft", {"loss/total": loss})
    found = {path.name: read_metrics(path)[0]["loss/total"] for path in tmp_path.glob("*.jsonl")}
    assert found == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_resuming_at_zero_keeps_only_what_came_before_training(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=None) as metrics:
        metrics.log(0, "eval", {"accuracy/heldout": 0.1})
        metrics.log(1, "sft", {"loss/total": 1.0})
    MetricsWriter(tmp_path, tensorboard=False, resume_step=0).close()
    assert steps_of(tmp_path) == [0]
    assert keep_through_step(tmp_path / "missing.jsonl", 3) == 0


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    with open_metrics(tmp_path / "other", rank=3, tensorboard=True, resume_step=None) as metrics:
        metrics.log(1, "sft", {"loss/total": 1.0})
        assert isinstance(metrics, SilentMetrics)
    assert not (tmp_path / "other").exists()
    with open_metrics(tmp_path / "first", rank=0, tensorboard=False, resume_step=None) as metrics:
        metrics.log(1, "sft", {"loss/total": 1.0})
    assert steps_of(tmp_path / "first") == [1]


def test_a_full_disk_loses_lines_but_not_the_run(tmp_path, caplog) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "lines.jsonl"
    file = JsonLinesFile(path)
    assert file.append({"step": 1})
    # A real file for the descriptor, a device that is always full under it.
    real = os.dup(file._file.fileno())
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._file.fileno())
    assert not file.append({"step": 2})
    assert not file.append({"step": 3})
    os.dup2(real, file._file.fileno())
    assert file.append({"step": 4})
    file.close()
    os.close(full)
    os.close(real)
    assert [row["step"] for row in read_json_lines(path)] == [1, 4]
    assert caplog.text.count("No space left") == 1
    assert "2 lines were lost" in caplog.text


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from megatron_klear.observe.metrics import MetricsWriter\n"
        "metrics = MetricsWriter(sys.argv[1], tensorboard=False, resume_step=None)\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    metrics.log(step, 'sft', {f'loss/{i}': 0.1 for i in range(50)})\n"
        "    if step == 20: print('going', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = steps_of(tmp_path)
    assert len(steps) >= 20
    assert steps == list(range(1, len(steps) + 1))


def test_tensorboard_has_the_same_numbers_and_hides_what_a_resume_undid(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True, resume_step=None) as metrics:
        for step in range(1, 6):
            metrics.log(step, "rl", {"reward/mean": float(step), "loss/total": math.nan})
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=3) as metrics:
        metrics.log(4, "rl", {"reward/mean": 40.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert all(math.isnan(event.value) for event in events.Scalars("loss/total"))
