"""Trainer and servers take turns on the same machine: the same bits as apart, whoever dies in whose turn."""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader

CONFIG = Path(__file__).parents[2] / "examples" / "quickstart_rl.yaml"
WORKER = str(Path(__file__).with_name("stand_in_worker.py"))
STEPS, LIMIT = 3, 400.0


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    checkpoint = run / "checkpoints" / f"step_{STEPS:08d}"
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def differing(first: Path, second: Path) -> list[str]:
    ours, theirs = checkpoint_tensors(first), checkpoint_tensors(second)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def kill_in_the_engines_turn(launch: Any, run: Path, step: int) -> None:
    """Wait for the checkpoint of a step, for servers that were lost, and for responses in flight; kill both ranks."""
    deadline, checkpoint = time.monotonic() + LIMIT, run / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    while not (checkpoint.is_file() and "is back with the current weights" in launch.output()):
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.02)
    time.sleep(0.5)
    launch.signal(signal.SIGKILL)
    launch.wait()
    lines = (run / "logs" / "memory.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines][-2:]
    assert [(row["turn"], row["step"], row["trainer_bytes"]) for row in last] == [("engines", step - 1, 0)] * 2


def calls(log: Path) -> list[str]:
    """Requests about memory, caches and checksums that the server answered, in order."""
    wanted = "release_memory|resume_memory|weights_checker|flush_cache"
    return re.findall(rf'"POST /((?:{wanted})\w*) HTTP/1.1" 200', log.read_text(errors="replace"))


def test_with_a_real_server_the_bits_are_the_same_as_apart(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    shared = [
        f"rl.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=4", "evaluation.at_end=false",
        "reward.require_think=false",
    ]  # fmt: skip
    colocated = [
        *rl_overrides("colocated"), *shared, "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}",
        "sglang.placement=colocated", "sglang.offload_weights=true", "evaluation.every_steps=1",
        "weight_sync.bucket_bytes=16384",
    ]  # fmt: skip
    run = tmp_path / "colocated"
    launch = start("train_rl", CONFIG, colocated)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    assert launch.output().count("proved by checksum") == STEPS + 1

    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        assert [len(reader.groups_of_step(step)) for step in range(1, STEPS + 1)] == [8] * STEPS
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["phase"]) for row in rows if row["phase"] == "eval"] == [(s, "eval") for s in (0, 1, 2)]
    steps = [row for row in rows if row["phase"] == "rl"]
    # Old weights, or a server that went on with what it had before, would be off by far more.
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in steps)
    assert {row[names.at_turn("engines", "trainer_bytes")] for row in steps} == {0}
    (resident,) = {row[names.at_turn("trainer", "trainer_bytes")] for row in steps}
    weights = sum(t.numel() for name, t in checkpoint_tensors(run).items() if not name.startswith("optimizer."))
    # Float32 weights and gradients, and half of two moments for each of two ranks; buffers are padded a little.
    assert 12 * weights <= resident < 1.1 * 12 * weights
    release, resume = "release_memory_occupation", "resume_memory_occupation"
    step = ["flush_cache", release, release, resume, "flush_cache", "weights_checker", resume]
    save = ["flush_cache", release, resume]
    asked = calls(run / "logs" / "engine_0.log")
    assert asked == [*step, *[*step, *save] * STEPS]

    apart = [*rl_overrides("apart"), *shared, f"scheduling.replay_from={run}"]
    launch = start("train_rl", CONFIG, apart)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    assert differing(run, tmp_path / "apart") == []


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Overrides that start stand-ins for servers, with faults."""
    program = Path(__file__).with_name("stand_in_server.py")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S {program} "$@"\n')
    python.chmod(0o755)

    def make(*faults: str) -> list[str]:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        for fault in faults:
            (directory / fault).touch()
        monkeypatch.setenv("STAND_IN_FAULTS", str(directory))
        return ["rollout.engine=sglang", f"sglang.venv={tmp_path / 'venv'}", "correction.stop_above_mean=null"]

    return make


def test_whoever_dies_or_hangs_in_whose_turn_the_bits_are_the_same(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    stand_ins: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server ends in the trainer's turn of step 1; the trainer is killed in the engines' turn of step 2, its state on
    the host; and after that a server never answers when it is to give up its memory.

    The stand-ins generate the same tokens at any weights, and end when they are asked for what a real server would not
    survive: to generate without memory, or to take back what was not given up.
    """
    shared = [f"rl.steps={STEPS}", "evaluation.at_end=false", "reward.require_think=false", "checkpoint.every_steps=1"]
    launch = start(WORKER, CONFIG, [*rl_overrides("apart"), *shared, *stand_ins()])
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    colocated = ["sglang.placement=colocated", "sglang.offload_weights=true", "weight_sync.timeout_seconds=4"]
    faulty = [*rl_overrides("faulty"), *shared, *stand_ins("2.die", "4.hang"), *colocated]
    monkeypatch.setenv("STAND_IN_SECONDS", "2")
    launch = start(WORKER, CONFIG, faulty)
    kill_in_the_engines_turn(launch, tmp_path / "faulty", step=1)
    assert "publishing goes on with 0 engines" in launch.output()
    monkeypatch.setenv("STAND_IN_SECONDS", "0")
    launch = start(WORKER, CONFIG, faulty)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    assert "gave no answer to /release_memory_occupation; it is ended, for its memory" in launch.output()
    assert "is back with the current weights" in launch.output()
    assert differing(tmp_path / "apart", tmp_path / "faulty") == []
    with LedgerReader(tmp_path / "faulty" / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []


@pytest.mark.parametrize("override", ["scheduling.mode=async"])
def test_it_is_refused_before_anything_starts(
    start: Callable[..., Any], rl_overrides: Callable[[str], list[str]], tmp_path: Path, override: str
) -> None:
    engine = ["rollout.engine=sglang", "sglang.placement=colocated", "sglang.urls=[http://127.0.0.1:9]"]
    launch = start("train_rl", CONFIG, [*rl_overrides("refused"), *engine, override])
    assert launch.wait(60) == [2, 2], launch.output()
    assert "scheduling.mode: got async, and sglang.placement is colocated" in launch.output()
    assert "sglang.urls: names servers" in launch.output()
    assert not (tmp_path / "refused").exists()
