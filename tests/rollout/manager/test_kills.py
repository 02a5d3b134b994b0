"""SIGKILL at random instants, in real processes: every prompt is trained exactly once all the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger import LedgerReader

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("killed_trainer.py")
STEPS, PER_STEP, NUM_PROMPTS, KILLS = 240, 3, 7, 8
"""A step is 6 responses of 20 tokens in the mean, in 8 slots of 0.5 ms a token: 8 lives of 0.25 s at most see no more
than 270 steps and 135 in the mean, so that the run is not at its end before it was killed."""


def launch(directory: Path, mode: str, order: str) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), str(directory), str(STEPS), mode, order]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_life(ledger: Path, number: int) -> None:
    """Wait until the ledger has been resumed so many times."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(RolloutError), LedgerReader(ledger) as reader:
            if [event for _, event, *_ in reader.events()].count("resumed") >= number:
                return
        time.sleep(0.002)
    pytest.fail(f"{ledger} was not resumed for the {number}th time")


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output.strip()) == (0, "done"), output


def weights_of(directory: Path) -> list[list]:
    return json.loads((directory / "weights.json").read_text())["weights"]


@pytest.mark.parametrize(
    ("mode", "order"), [("sync", "fixed"), ("one_step_off", "completion"), ("async", "completion")]
)
def test_killed_at_random_every_prompt_is_trained_once(tmp_path, mode, order):
    rng = random.Random(mode)
    killed = tmp_path / "killed"
    kills = 0
    for life in range(KILLS):
        process = launch(killed, mode, order)
        wait_for_life(killed / "ledger.sqlite", life + 1)
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL or output.strip() == "done", output
        kills += process.returncode == -signal.SIGKILL
    assert kills >= KILLS // 2
    finish(launch(killed, mode, order))

    weights = weights_of(killed)
    keys = [(epoch, prompt) for _, epoch, prompt, _, _ in weights]
    walk = [(i // NUM_PROMPTS, f"p{i % NUM_PROMPTS}") for i in range(STEPS * PER_STEP)]
    assert len(keys) == len(set(keys)) == STEPS * PER_STEP
    bound = {"sync": 0, "one_step_off": 1, "async": 2}[mode]
    assert all(0 <= staleness <= bound for *_, staleness in weights)
    ahead = bound * PER_STEP
    assert set(walk[: STEPS * PER_STEP - ahead]) <= set(keys) <= set(walk + [
        (i // NUM_PROMPTS, f"p{i % NUM_PROMPTS}") for i in range(len(walk), len(walk) + ahead)
    ])  # fmt: skip
    with LedgerReader(killed / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        events = [event for _, event, *_ in reader.events()]
        trained = {(g.epoch, g.prompt.prompt_id): g.step for s in reader.steps() for g in reader.groups_of_step(s)
                   if g.state == "trained"}  # fmt: skip
    assert trained == {(epoch, prompt): step for step, epoch, prompt, _, _ in weights}
    assert events.count("resumed") == KILLS + 1

    if order == "fixed":
        whole = tmp_path / "whole"
        finish(launch(whole, mode, order))
        assert weights == weights_of(whole), "the same steps, prompts and tokens as without a kill"
