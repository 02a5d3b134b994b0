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

HERE = Path(__file__).parent
SFT_CONFIG = CONFIG.with_name("quickstart_sft.yaml")
STEPS = 2


def evaluated(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["phase"] == "eval"]


@pytest.fixture
def stopped(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Path, list[str]], Path]:
    """Runs a worker, stops it in its first evaluation, and runs it to its end; returns the run's directory."""

    def run(worker: str, config: Path, overrides: list[str]) -> Path:
        monkeypatch.setenv("STAND_IN_SECONDS", "3600")
        stopped = start(str(HERE / worker), config, overrides)
        log, deadline = tmp_path / "run" / "logs" / "engine_0.log", time.monotonic() + 120
        while not (log.exists() and "TOKENS" in log.read_text()):
            assert time.monotonic() < deadline, stopped.output()
            assert all(process.poll() is None for process in stopped.processes), stopped.output()
            time.sleep(0.2)
        stopped.processes[1].send_signal(signal.SIGTERM)  # the rank that asks the servers is not the one that is told
        assert stopped.wait() == [75, 75], stopped.output()
        assert evaluated(tmp_path / "run") == []
        monkeypatch.setenv("STAND_IN_SECONDS", "0")
        resumed = start(str(HERE / worker), config, overrides)
        assert resumed.wait() == [0, 0], resumed.output()
        return tmp_path / "run"

    return run


def test_responses_of_an_evaluation_give_way_to_a_stop(
    stopped: Callable[..., Path], rl_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]]
) -> None:
    """That before the first step is made by the next life."""
    overrides = [
        *rl_overrides("run"), f"rl.steps={STEPS}", "evaluation.every_steps=1", "reward.require_think=false",
        *stand_ins(),
    ]  # fmt: skip
    assert evaluated(stopped("stand_in_worker.py", CONFIG, overrides)) == [0, 1, STEPS]


@pytest.mark.parametrize("every", [2, 3])
def test_fine_tuning_makes_up_for_the_evaluation_that_gave_way(
    stopped: Callable[..., Path], sft_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    every: int,
) -> None:  # fmt: skip
    """In the middle of a run of three steps, and in its last one, where nothing comes after it."""
    overrides = [
        *sft_overrides("run"), "sft.steps=3", f"evaluation.every_steps={every}",
        "evaluation.at_end=false", "checkpoint.every_steps=100", *stand_ins(),
    ]  # fmt: skip
    run = stopped("stand_in_sft_worker.py", SFT_CONFIG, overrides)
    assert evaluated(run) == [every]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 3


def test_an_evaluation_that_the_ranks_make_themselves_gives_way_too(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """One rank is told to stop; the other hears of it in the middle of its share."""
    overrides = [
        *rl_overrides("run"), f"rl.steps={STEPS}", "evaluation.every_steps=1", "reward.require_think=false",
        "rollout.batch_responses=1",
    ]  # fmt: skip
    stopped = start("train_rl", CONFIG, [*overrides, "evaluation.samples_per_prompt=5000"])
    note, deadline = tmp_path / "run" / "logs" / "rank_00001.json", time.monotonic() + 120
    while not (note.is_file() and json.loads(note.read_text())["phase"] == "generate"):
        assert time.monotonic() < deadline, stopped.output()
        assert all(process.poll() is None for process in stopped.processes), stopped.output()
        time.sleep(0.1)
    began = time.monotonic()
    stopped.processes[1].send_signal(signal.SIGTERM)
    assert stopped.wait() == [75, 75], stopped.output()
    assert time.monotonic() - began < 60
    assert evaluated(tmp_path / "run") == []
    resumed = start("train_rl", CONFIG, overrides)
    assert resumed.wait() == [0, 0], resumed.output()
    assert evaluated(tmp_path / "run") == [0, 1, STEPS]
