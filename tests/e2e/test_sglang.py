"""The RL loop with a real SGLang server: two trainer ranks, weights published and proved every step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart_rl.yaml"


def test_a_run_generates_on_a_server_that_it_starts_and_ends(
    start: Callable[..., object],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    overrides = [*rl_overrides("served"), "rl.steps=2", "parallel.tp=2", "rollout.engine=sglang"]
    launch = start("train_rl", CONFIG, [*overrides, f"sglang.venv={sglang_settings.venv}"])
    assert launch.wait(400) == [0, 0], launch.output()
    run = tmp_path / "served"
    output = launch.output()
    for version in range(3):
        assert f"published version {version}: " in output
    assert output.count("proved by checksum") == 3
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "rl"]
    assert [row["step"] for row in steps] == [1, 2]
    # Float32 on both sides; old weights or another temperature would be off by far more.
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in steps)
    assert (run / "logs" / "engine_0.log").stat().st_size > 0
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(run) in command_line(pid)]


def test_a_killed_server_comes_back_with_current_weights_and_a_killed_trainer_trains_every_prompt_once(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    """Asynchronous, with partial rollouts: the only server is killed in the middle, and later both ranks are."""
    steps, per_step, run = 9, 8, tmp_path / "killed"
    overrides = [
        *rl_overrides("killed"), f"rl.steps={steps}", "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}",
        "sglang.stream_interval=4", "scheduling.mode=async", "scheduling.max_staleness=2",
        "scheduling.order=completion", "scheduling.stall_seconds=60", "checkpoint.every_steps=2",
        "evaluation.at_end=false", "reward.require_think=false",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    wait_for(3, run, launch)
    server = min(servers_of(run), key=psutil.Process.create_time)
    server.send_signal(signal.SIGKILL)
    wait_for(6, run, launch)
    launch.signal(signal.SIGKILL)
    launch.wait()
    first = launch.output()
    assert "is back with the current weights" in first
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait(400) == [0, 0], launch.output()
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        groups = [(step, group) for step in range(1, steps + 1) for group in reader.groups_of_step(step)]
        assert [step for step, _ in groups] == [step for step in range(1, steps + 1) for _ in range(per_step)]
        assert len({(group.epoch, group.prompt.prompt_id) for _, group in groups}) == steps * per_step
        assert {group.state for _, group in groups} == {"trained"}
        assert all(0 <= step - 1 - group.oldest_version <= 2 for step, group in groups)
    assert not servers_of(run)


def wait_for(step: int, run: Path, launch: Any) -> None:
    """Wait until a step has been finished."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 400
    while not metrics.is_file() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.05)


def servers_of(run: Path) -> list[psutil.Process]:
    """SGLang's processes that serve a run's model, without the supervisor."""
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    return [psutil.Process(p) for p in pids if "sglang.launch_server" in (c := command_line(str(p))) and str(run) in c
            and "supervisor.py" not in c]  # fmt: skip


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sglang.venv=/nowhere", "sglang.venv: no /nowhere/bin/python; run tools/setup_sglang.sh"),
        ("sglang.urls=[http://127.0.0.1:9]", "sglang.urls: engine 0 (http://127.0.0.1:9): /server_info: no connection"),
        ("sglang.urls=[localhost:30000]", "sglang.urls: got 'localhost:30000', must be http://HOST:PORT"),
    ],
)
def test_what_cannot_be_reached_stops_every_rank_with_status_2(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], override: str, text: str
) -> None:
    launch = start("train_rl", CONFIG, [*rl_overrides("unserved"), "rollout.engine=sglang", override])
    assert launch.wait(240) == [2, 2], launch.output()
    assert text in launch.output()
