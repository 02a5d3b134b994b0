"""A run that is killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

STEPS = 8


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, whole."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def wait_for_lines(launch, run: Path, wanted: int) -> None:
    """Wait until a run has logged so many steps; fails with its output when it dies or stalls first."""
    deadline = time.monotonic() + 200
    while lines(run) < wanted:
        assert time.monotonic() < deadline, launch.output()
        assert all(p.poll() is None for p in launch.processes), launch.output()
        time.sleep(0.002)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def kill_in_the_middle(launch, run: Path, rng: random.Random) -> None:
    """SIGKILL all ranks somewhere between the second and the last step."""
    wait_for_lines(launch, run, rng.randint(2, STEPS - 2))
    time.sleep(rng.random() * 0.2)
    launch.signal(signal.SIGKILL)
    launch.wait()


@pytest.mark.parametrize("entry", ["train_sft", "train_rl"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(entry, start, sft_overrides, rl_overrides, tmp_path):
    kind = entry.removeprefix("train_")
    overrides = sft_overrides if kind == "sft" else rl_overrides
    steps = [f"{kind}.steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep=3", "evaluation.at_end=false"]
    config = f"examples/quickstart_{kind}.yaml"

    whole = start(entry, config, [*overrides("whole"), *steps])
    assert whole.wait() == [0, 0], whole.output()

    killed = start(entry, config, [*overrides("killed"), *steps])
    kill_in_the_middle(killed, tmp_path / "killed", random.Random(entry))
    assert not (tmp_path / "killed" / "checkpoints" / f"step_{STEPS:08d}").exists()

    resumed = start(entry, config, [*overrides("killed"), *steps])
    assert resumed.wait() == [0, 0], resumed.output()

    first = stored_tensors(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}")
    second = stored_tensors(tmp_path / "killed" / "checkpoints" / f"step_{STEPS:08d}")
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in first)
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different
    earlier = stored_tensors(tmp_path / "whole" / "checkpoints" / f"step_{STEPS - 2:08d}")
    weights = [name for name in first if name.endswith(".weight") and not name.startswith("optimizer.")]
    assert weights
    still = [name for name in weights if torch.equal(earlier[name], first[name])]
    assert not still, "weights that do not move are the same after any resume"

    logged = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1)), "every step is logged once"


def test_asked_to_stop_saves_and_says_how_to_resume(start, sft_overrides, tmp_path):
    steps = ["sft.steps=2000", "checkpoint.every_steps=0", "evaluation.at_end=false"]
    launch = start("train_sft", "examples/quickstart_sft.yaml", [*sft_overrides("asked"), *steps])
    wait_for_lines(launch, tmp_path / "asked", 2)
    second = start("train_sft", "examples/quickstart_sft.yaml", [*sft_overrides("asked"), *steps], ranks=1)
    assert second.wait() == [2], second.output()
    assert f"is in use by process {launch.processes[0].pid} on" in second.output()
    launch.processes[1].send_signal(signal.SIGTERM)  # one rank is enough
    assert launch.wait() == [75, 75], launch.output()
    assert "start again" in launch.output()
    done = lines(tmp_path / "asked")
    assert (tmp_path / "asked" / "checkpoints" / f"step_{done:08d}" / "manifest.json").is_file()


def test_rank_that_hangs_is_named(start, sft_overrides, tmp_path):
    steps = ["sft.steps=2000", "checkpoint.every_steps=0", "evaluation.at_end=false", "parallel.timeout_seconds=15"]
    launch = start("train_sft", "examples/quickstart_sft.yaml", [*sft_overrides("hung"), *steps])
    wait_for_lines(launch, tmp_path / "hung", 2)
    launch.processes[1].send_signal(signal.SIGSTOP)
    assert launch.processes[0].wait(120) == 1, launch.output()
    told = launch.output().splitlines()
    # First while it waits, as NCCL's watchdog would let nobody say it later; then by the error of the exchange.
    first, *_, last = (i for i, line in enumerate(told) if "last seen" in line)
    assert "no news for" in told[first], launch.output()
    assert told[first + 1].startswith("rank 1: in step"), launch.output()
    assert "its process lived" not in told[first + 1]
    assert "its process lived" in told[first + 2]
    assert "failed; where the ranks" in told[last]
    assert told[last + 1].startswith("rank 1: in step"), launch.output()


def test_a_first_rank_that_hangs_is_named_before_the_exchange_is_given_up(start, sft_overrides, tmp_path):
    """As with NCCL, whose watchdog ends processes: nothing that they say after the time limit counts here."""
    steps = ["sft.steps=2000", "checkpoint.every_steps=0", "evaluation.at_end=false", "parallel.timeout_seconds=40"]
    launch = start("train_sft", "examples/quickstart_sft.yaml", [*sft_overrides("hung"), *steps])
    wait_for_lines(launch, tmp_path / "hung", 2)
    launch.processes[0].send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 120
    while "last seen" not in launch.output():
        assert time.monotonic() < deadline, launch.output()
        time.sleep(0.05)
    assert launch.processes[1].poll() is None, launch.output()
    time.sleep(0.5)
    told = launch.output().splitlines()
    [first] = [i for i, line in enumerate(told) if "last seen" in line]
    assert told[first].startswith("[rank 1] no news for"), launch.output()
    assert told[first + 1].startswith("rank 0: in step"), launch.output()
    assert ".py:" in told[first + 2], "where the one that waits is"
