"""The rollout ledger of real runs: complete after a run, replayed to the bit, recalled after a kill, survived when lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_klear.rollout.ledger import LedgerReader

STEPS, PER_STEP, ROWS = 7, 8, 48
CONFIG = "examples/quickstart_rl.yaml"
SHORT = ["checkpoint.every_steps=2", "checkpoint.keep=4", "evaluation.at_end=false"]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    checkpoint = run / "checkpoints" / f"step_{STEPS:08d}"
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def differing(first: Path, second: Path) -> list[str]:
    mine, theirs = tensors_of(first), tensors_of(second)
    assert mine.keys() == theirs.keys()
    return [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]


def walked(run: Path) -> list[tuple[int, int, str, str]]:
    """(step, epoch, prompt, state) of every group, in the order of training."""
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        return [
            (step, group.epoch, group.prompt.prompt_id, group.state)
            for step in reader.steps()
            for group in reader.groups_of_step(step)
        ]


@pytest.fixture
def run(start, rl_overrides, tmp_path):
    def go(name: str, *overrides: str, steps: int = STEPS, status: int = 0) -> Path:
        launch = start("train_rl", CONFIG, [*rl_overrides(name), *SHORT, f"rl.steps={steps}", *overrides])
        assert launch.wait() == [status, status], launch.output()
        return tmp_path / name

    return go


def test_every_prompt_is_trained_once_and_a_replay_gives_the_same_bits(run, tmp_path):
    """Seven steps of eight prompts cross from the first epoch of 48 into the second."""
    whole = run("whole")
    rows = walked(whole)
    assert [state for *_, state in rows] == ["trained"] * STEPS * PER_STEP
    assert [step for step, *_ in rows] == [step for step in range(1, STEPS + 1) for _ in range(PER_STEP)]
    keys = [(epoch, prompt) for _, epoch, prompt, _ in rows]
    assert len(set(keys)) == STEPS * PER_STEP
    assert [epoch for epoch, _ in keys] == [0] * ROWS + [1] * (STEPS * PER_STEP - ROWS)
    state = json.loads((whole / "checkpoints" / f"step_{STEPS:08d}" / "run_state.json").read_text())
    assert (state["ledger"]["step"], state["ledger"]["in_flight"]) == (STEPS, [])

    replayed = run("replayed", f"scheduling.replay_from={whole}")
    assert differing(whole, replayed) == []
    assert not (replayed / "ledger.sqlite").exists()


def test_resumed_without_its_ledger_it_goes_on_and_says_what_it_trains(run, tmp_path):
    whole = run("whole")
    lost = run("lost", steps=4)
    for file in lost.glob("ledger.sqlite*"):
        file.unlink()
    run("lost")
    assert differing(whole, lost) == []
    assert walked(lost) == walked(whole)[4 * PER_STEP :]


def test_steps_after_the_checkpoint_are_trained_again_from_the_ledger(run, tmp_path):
    """The checkpoints from step 3 on are taken away, as if the run had been killed before they were written."""
    import shutil

    whole, cut = run("whole"), run("cut")
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name > "step_00000002":
            shutil.rmtree(checkpoint)
    run("cut")
    assert differing(whole, cut) == []
    assert walked(cut) == walked(whole)
    with LedgerReader(cut / "ledger.sqlite") as reader:
        events = [event for _, event, *_ in reader.events()]
    assert events.count("rolled back") == (STEPS - 2) * PER_STEP
    # The responses of step 3 were sampled from the weights of step 2, which are still there; later ones were not.
    assert events.count("drawn again") == (STEPS - 3) * PER_STEP


def test_a_damaged_ledger_stops_the_run_with_one_message(run, start, rl_overrides, tmp_path):
    damaged = run("damaged", steps=2)
    for file in damaged.glob("ledger.sqlite-*"):
        file.unlink()
    file = damaged / "ledger.sqlite"
    file.write_bytes(b"\xa5" * file.stat().st_size)
    launch = start("train_rl", CONFIG, [*rl_overrides("damaged"), *SHORT, f"rl.steps={STEPS}"])
    assert launch.wait() == [1, 1], launch.output()
    lines = [line for line in launch.output().splitlines() if "ledger is damaged" in line]
    assert len(lines) == 1, launch.output()
    assert "Move it aside" in lines[0]
    assert str(file) in lines[0]
