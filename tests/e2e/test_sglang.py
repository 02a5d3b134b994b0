"""The RL loop with a real SGLang server: two trainer ranks, weights published and proved every step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names

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
