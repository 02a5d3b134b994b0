"""A run that is asked to stop while a step's responses are drawn leaves at once, and the next life draws the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.session.finished_groups import DIRECTORY
from tests.e2e.served_runs import CONFIG, step_rows, wait_for

HERE = Path(__file__).parent
STEPS, PER_STEP, RESPONSES = 3, 8, 4
SHORT = [
    f"rl.steps={STEPS}", "reward.require_think=false", "evaluation.at_end=false", "checkpoint.every_steps=100",
]  # fmt: skip


def tokens_of(run: Path, step: int) -> dict[tuple[int, str], list[list[int]]]:
    """Responses of a step by epoch and prompt."""
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        return {
            (group.epoch, group.prompt.prompt_id): [group.rollouts[i].response_ids.tolist() for i in range(RESPONSES)]
            for group in reader.groups_of_step(step)
        }


def stop_in_second_step(launch: Any, run: Path, *, told: int, wanted: dict[str, int]) -> int:
    """Ask a rank to stop once ranks have finished so many groups of step 2; returns how many are kept in the end."""

    def kept(name: str) -> int:
        file = run / DIRECTORY / name
        return sum(1 for line in file.read_text().splitlines() if line) if file.is_file() else 0

    wait_for(1, run, launch)
    deadline = time.monotonic() + 120
    while any(kept(name) < count for name, count in wanted.items()):
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.02)
    began = time.monotonic()
    launch.processes[told].send_signal(signal.SIGTERM)
    assert launch.wait() == [75, 75], launch.output()
    assert time.monotonic() - began < 60
    assert "stopped before step 2; start again" in launch.output()
    assert [row["step"] for row in step_rows(run)] == [1]
    return sum(kept(file.name) for file in (run / DIRECTORY).iterdir())


@pytest.mark.parametrize(
    ("slow", "told"), [("0", 1), ("0,1", 1)], ids=["one that has done its share is told", "all are in the middle"]
)
def test_responses_that_the_ranks_draw_themselves_give_way_to_a_stop(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, slow: str, told: int,
) -> None:  # fmt: skip
    """The checkpoint of step 1 is written at the stop; what is finished is on disk, and of both ranks."""
    run, worker = tmp_path / "run", str(HERE / "slow_worker.py")
    monkeypatch.setenv("KLEAR_SLOW_RANKS", slow)
    monkeypatch.setenv("KLEAR_SECONDS_PER_TOKEN", "0.1")
    overrides = [*rl_overrides("run"), *SHORT, "rollout.batch_responses=2"]
    share = PER_STEP // 2
    wanted = {"rank_00000.jsonl": 1, "rank_00001.jsonl": 1 if "1" in slow else share}
    finished = stop_in_second_step(start(worker, CONFIG, overrides), run, told=told, wanted=wanted)
    assert sum(wanted.values()) <= finished < PER_STEP
    assert (run / "checkpoints" / "step_00000001" / "manifest.json").is_file()

    monkeypatch.setenv("KLEAR_SECONDS_PER_TOKEN", "0")
    resumed = start(worker, CONFIG, overrides)
    assert resumed.wait() == [0, 0], resumed.output()
    assert f"{finished} prompt groups were finished when the run was ended" in resumed.output()
    assert not list((run / DIRECTORY).iterdir())
    assert [row["step"] for row in step_rows(run)] == [1, 2, 3]
    keys = [key for step in range(1, STEPS + 1) for key in tokens_of(run, step)]
    assert len(set(keys)) == len(keys) == STEPS * PER_STEP
    undisturbed = start(worker, CONFIG, [*overrides, f"run.dir={tmp_path / 'undisturbed'}"])
    assert undisturbed.wait() == [0, 0], undisturbed.output()
    for step in (1, 2):
        assert tokens_of(run, step) == tokens_of(tmp_path / "undisturbed", step)
    assert tokens_of(run, 3).keys() == tokens_of(tmp_path / "undisturbed", 3).keys()


def test_recorded_responses_of_servers_give_way_to_a_stop(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The rank that asks the servers is not the one that is told."""
    run, worker = tmp_path / "run", str(HERE / "stand_in_worker.py")
    overrides = [
        *rl_overrides("run"), *SHORT, "scheduling.rollout_only=true", "rollout.batch_responses=4", *stand_ins(),
    ]  # fmt: skip
    monkeypatch.setenv("STAND_IN_SECONDS", "1")  # a step takes eight
    stopped = start(worker, CONFIG, overrides)
    finished = stop_in_second_step(stopped, run, told=1, wanted={"rank_00000.jsonl": 1})
    assert 1 <= finished < PER_STEP
    assert (run / "checkpoints" / "step_00000001" / "manifest.json").is_file()

    log = run / "logs" / "engine_0.log"
    asked = log.read_text().count("TOKENS")
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    resumed = start(worker, CONFIG, overrides)
    assert resumed.wait() == [0, 0], resumed.output()
    assert f"{finished} prompt groups were finished when the run was ended" in resumed.output()
    assert log.read_text().count("TOKENS") - asked == ((STEPS - 1) * PER_STEP - finished) * RESPONSES
    assert [row["step"] for row in step_rows(run)] == [1, 2, 3]
    undisturbed = start(worker, CONFIG, [*overrides, f"run.dir={tmp_path / 'undisturbed'}"])
    assert undisturbed.wait() == [0, 0], undisturbed.output()
    for step in range(1, STEPS + 1):
        assert len(tokens_of(run, step)) == PER_STEP
        assert tokens_of(run, step) == tokens_of(tmp_path / "undisturbed", step)
    assert not (run / DIRECTORY / "rank_00000.jsonl").exists()
