"""A run that is asked to stop while servers answer an evaluation leaves at once, and the next life evaluates."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served_runs import CONFIG

WORKER = str(Path(__file__).with_name("stand_in_worker.py"))
STEPS = 2


def evaluated(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["phase"] == "eval"]


def test_responses_of_an_evaluation_give_way_to_a_stop(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    stand_ins: Callable[..., list[str]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    overrides = [
        *rl_overrides("run"), f"rl.steps={STEPS}", "evaluation.every_steps=1", "reward.require_think=false",
        f"data.heldout=[{data / 'heldout.jsonl'}]", *stand_ins(),
    ]  # fmt: skip
    monkeypatch.setenv("STAND_IN_SECONDS", "3600")
    stopped = start(WORKER, CONFIG, overrides)
    log = run / "logs" / "engine_0.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "TOKENS" in log.read_text()):
        assert time.monotonic() < deadline, stopped.output()
        assert all(process.poll() is None for process in stopped.processes), stopped.output()
        time.sleep(0.2)
    stopped.processes[1].send_signal(signal.SIGTERM)  # the rank that asks the servers is not the one that is told
    assert stopped.wait() == [75, 75], stopped.output()
    assert "stopped before step 1" in stopped.output()
    assert evaluated(run) == []

    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    resumed = start(WORKER, CONFIG, overrides)
    assert resumed.wait() == [0, 0], resumed.output()
    assert evaluated(run) == [0, 1, STEPS]
