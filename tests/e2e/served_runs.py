"""Watching runs of the real entry with real SGLang servers."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_klear.rollout.ledger import LedgerReader

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart_rl.yaml"


def wait_for(step: int, run: Path, launch: Any) -> None:
    """Wait until a step has been finished."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 600
    while not metrics.is_file() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.05)


def servers_of(run: Path) -> list[psutil.Process]:
    """SGLang's processes that serve a run's model, without the supervisor; the server itself is the oldest."""
    pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    found = [psutil.Process(p) for p in pids if "sglang.launch_server" in (c := command_line(str(p))) and str(run) in c
             and "supervisor.py" not in c]  # fmt: skip
    return sorted(found, key=psutil.Process.create_time)


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def published(launch: Any) -> list[int]:
    """Versions that a life of a run has published, in order."""
    return [int(number) for number in re.findall(r"published version (\d+): ", launch.output())]


def step_rows(run: Path) -> list[dict[str, Any]]:
    """Metrics of the training steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "rl"]


def check_ledger(run: Path, *, steps: int, per_step: int, staleness: int) -> None:
    """Every step has its prompts, each is trained once, and none from weights that are too old."""
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        groups = [(step, group) for step in range(1, steps + 1) for group in reader.groups_of_step(step)]
        assert [step for step, _ in groups] == [step for step in range(1, steps + 1) for _ in range(per_step)]
        assert len({(group.epoch, group.prompt.prompt_id) for _, group in groups}) == steps * per_step
        assert {group.state for _, group in groups} == {"trained"}
        assert all(0 <= step - 1 - group.oldest_version <= staleness for step, group in groups)
