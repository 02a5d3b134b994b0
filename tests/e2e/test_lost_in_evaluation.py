"""The only server ends or hangs while nobody but an evaluation needs it: it is started anew, and asked for the rest."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.rollout.ledger import LedgerReader
from tests.e2e.served_runs import CONFIG, servers_of

WORKER = str(Path(__file__).with_name("stand_in_worker.py"))
SFT_CONFIG = CONFIG.with_name("quickstart_sft.yaml")
TRAINED = 8 * 4
"""Responses of the step that comes first."""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_server_that_is_lost_in_the_last_evaluation_comes_back(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, mode: str,
) -> None:  # fmt: skip
    """Nothing else is asked of it then, so that nothing else would tell."""
    overrides = [
        *rl_overrides("run"), "rl.steps=1", "evaluation.every_steps=0", "reward.require_think=false",
        f"scheduling.mode={mode}", "scheduling.stall_seconds=4", *stand_ins(f"{TRAINED + 5}.end"),
    ]  # fmt: skip
    launch = start(WORKER, CONFIG, overrides)
    assert launch.wait(180) == [0, 0], launch.output()
    assert "does not answer, idle" in launch.output()
    assert "is back with the current weights" in launch.output()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = (row for row in rows if row["phase"] == "eval")
    assert (evaluated["step"], evaluated["accuracy/heldout_count"]) == (1, 8)


@pytest.mark.parametrize(
    ("mode", "idle"),
    [("async", 600), ("sync", 1)],
    ids=["judged by the manager", "given up before that"],
)
def test_a_server_that_hangs_in_the_last_evaluation_comes_back(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, mode: str, idle: int,
) -> None:  # fmt: skip
    """It answers all but what it is to generate; the manager, which has nothing in it, sees that it brings no token."""
    overrides = [
        *rl_overrides("run"), "rl.steps=1", "evaluation.every_steps=0", "reward.require_think=false",
        f"scheduling.mode={mode}", "scheduling.stall_seconds=4", f"sglang.idle_seconds={idle}",
        *stand_ins(f"{TRAINED + 5}.mute"),
    ]  # fmt: skip
    launch = start(WORKER, CONFIG, overrides)
    assert launch.wait(180) == [0, 0], launch.output()
    assert launch.output().count("brought no token to anybody for") >= 1
    assert "is back with the current weights" in launch.output()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = (row for row in rows if row["phase"] == "eval")
    assert (evaluated["step"], evaluated["accuracy/heldout_count"]) == (1, 8)


@pytest.mark.parametrize(
    ("when", "fault", "more"),
    [
        ("in the first evaluation", "5.end", ()),
        ("before the second", "8.leave", ()),
        ("in its publish", "2.pause", ()),
        ("hanging", "5.mute", ("sglang.idle_seconds=2",)),
        ("hanging beside one that works", "5.mute", ("sglang.idle_seconds=2", "sglang.servers=2")),
        ("hanging, on the trainer's GPUs", "5.mute", ("sglang.idle_seconds=2", "sglang.placement=colocated")),
        (
            "hanging beside one that works on the trainer's GPUs",
            "5.mute",
            ("sglang.idle_seconds=2", "sglang.servers=2", "sglang.placement=colocated"),
        ),
        ("on them in the trainer's turn", "2.die", ("sglang.placement=colocated",)),
    ],
)
def test_fine_tuning_brings_a_lost_server_back_for_its_evaluations(
    start: Callable[..., Any], sft_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, when: str, fault: str, more: tuple[str, ...],
) -> None:  # fmt: skip
    """It has no rollout manager that would."""
    overrides = [
        *sft_overrides("run"), "sft.steps=2", "evaluation.every_steps=1", "evaluation.at_end=false",
        *stand_ins(fault), *more,
    ]  # fmt: skip
    launch = start(str(Path(__file__).with_name("stand_in_sft_worker.py")), SFT_CONFIG, overrides)
    assert launch.wait(180) == [0, 0], launch.output()
    why = "brings no tokens" if when.startswith("hanging") else "does not answer"
    assert launch.output().count(f"{why} and is to come back") == 1
    assert launch.output().count("is back with the current weights") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["accuracy/heldout_count"]) for row in rows if row["phase"] == "eval"]
    assert found == [(1, 8), (2, 8)]


@pytest.mark.parametrize(
    ("faults", "more"),
    [
        (("5.end", "2.late"), ()),
        (("5.end", "2.late"), ("sglang.placement=colocated",)),
        (("5.mute", "3.late"), ("sglang.servers=2", "sglang.idle_seconds=2")),
    ],
    ids=["in an evaluation", "in an evaluation on the trainer's GPUs", "before a publish"],
)
def test_a_stop_waits_for_no_server_that_comes_back(
    start: Callable[..., Any], sft_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, faults: tuple[str, ...], more: tuple[str, ...],
) -> None:  # fmt: skip
    """Nor does it leave it behind, with memory that is the trainer's now; the next life evaluates."""
    overrides = [
        *sft_overrides("run"), "sft.steps=2", "evaluation.every_steps=1", "evaluation.at_end=false",
        *stand_ins(*faults), *more,
    ]  # fmt: skip
    worker = str(Path(__file__).with_name("stand_in_sft_worker.py"))
    launch = start(worker, SFT_CONFIG, overrides)
    deadline = time.monotonic() + 120
    while "is to come back" not in launch.output():
        assert time.monotonic() < deadline, launch.output()
        time.sleep(0.1)
    time.sleep(1.0)
    launch.signal(signal.SIGTERM)
    stopped = time.monotonic()
    assert launch.wait(180) == [75, 75], launch.output()
    assert time.monotonic() - stopped < 60, "of 300 that the server takes"
    assert not servers_of(tmp_path / "run")
    again = start(worker, SFT_CONFIG, overrides)
    assert again.wait(180) == [0, 0], again.output()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["accuracy/heldout_count"]) for row in rows if row["phase"] == "eval"]
    assert found == [(1, 8), (2, 8)]


@pytest.mark.parametrize("fault", ["end", "mute"])
def test_responses_that_a_lost_server_finished_are_not_drawn_again(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], stand_ins: Callable[..., list[str]],
    tmp_path: Path, fault: str,
) -> None:  # fmt: skip
    """Recording alone; it has one request at a time, and ends or hangs with the tenth."""
    overrides = [
        *rl_overrides("run"), "rl.steps=1", "evaluation.every_steps=0", "evaluation.at_end=false",
        "scheduling.rollout_only=true", "rollout.batch_responses=1", "sglang.idle_seconds=2", *stand_ins(f"10.{fault}"),
    ]  # fmt: skip
    launch = start(WORKER, CONFIG, overrides)
    assert launch.wait(180) == [0, 0], launch.output()
    assert launch.output().count("is back with the current weights") == 1
    (faults,) = {file.parent for file in tmp_path.glob(f"*/10.{fault}")}
    assert len(list(faults.glob("*.asked"))) == TRAINED + 1
    with LedgerReader(tmp_path / "run" / "ledger.sqlite") as reader:
        assert [len(group.rollouts) for group in reader.groups_of_step(1)] == [4] * 8
