"""A machine whose graders hang, in a run of two machines with stand-ins for servers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served_runs import CONFIG

WORKER = str(Path(__file__).with_name("hung_grader_worker.py"))
HOSTS = ("127.0.0.1", "127.0.0.2")
LIMIT = 15.0


@pytest.mark.parametrize("rollout_only", ["false", "true"])
def test_the_machine_is_named_its_responses_graded_elsewhere_and_the_run_goes_on(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    stand_ins: Callable[..., list[str]],
    tmp_path: Path,
    rollout_only: str,
) -> None:
    """Both where the manager grades, and where all ranks wait for the first one to have graded a step."""
    run = tmp_path / "run"
    overrides = [
        *rl_overrides("run"), *stand_ins(), "rl.steps=3", "evaluation.at_end=false", "checkpoint.every_steps=0",
        "reward.require_think=false", "weight_sync.transport=tensor",
        f"reward.machine_seconds={LIMIT}", f"scheduling.rollout_only={rollout_only}",
    ]  # fmt: skip
    launch = start(WORKER, CONFIG, overrides, hosts=HOSTS)
    ages: list[float] = []
    while any(process.poll() is None for process in launch.processes):
        note = run / "logs" / "rank_00000.json"
        if "published version 0" in launch.output() and note.is_file():
            ages.append(time.time() - json.loads(note.read_text())["time"])
        assert time.monotonic() - launch.started < 180.0, launch.output()
        time.sleep(0.2)
    assert launch.wait() == [0, 0], launch.output()
    text = launch.output()
    assert "machine 1 (127.0.0.1) did not grade: TimeoutError: it took the call and gave no answer within 15 s" in text
    assert text.count("it is not asked again in this run (reward.machine_seconds = 15)") <= 4, "once a call in flight"
    assert len([line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"]]) == 3
    # One wait of the manager's is 5 s; without a sign it would have been silent for all of the limit.
    assert max(ages) < LIMIT - 3.0
