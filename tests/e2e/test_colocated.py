"""Trainer and a real SGLang server take turns: the same bits as apart, also over a kill in the engines' turn."""

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


def turns(run: Path) -> list[dict[str, Any]]:
    """What was measured after each handover, by rank."""
    file = run / "logs" / "memory.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def kill_in_the_engines_turn(launch: Any, run: Path, step: int) -> None:
    """Wait until the checkpoint of a step is written and the trainer's state is away again, then kill both ranks."""
    deadline = time.monotonic() + LIMIT
    while not (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file():
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.02)
    time.sleep(0.3)
    launch.signal(signal.SIGKILL)
    launch.wait()


def calls(log: Path) -> list[str]:
    """Control requests that the server answered, in order."""
    wanted = "release_memory|resume_memory|update_weights_from|weights_checker|continue_generation|flush_cache"
    return re.findall(rf'"POST /((?:{wanted})\w*)', log.read_text(errors="replace"))


def test_the_same_bits_as_apart_also_when_killed_while_the_trainers_state_is_away(
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
    kill_in_the_engines_turn(launch, run, step=2)
    assert [row["turn"] for row in turns(run)][-2:] == ["engines"] * 2
    first_log = calls(run / "logs" / "engine_0.log")
    launch = start("train_rl", CONFIG, colocated)
    assert launch.wait(LIMIT) == [0, 0], launch.output()

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
    order = [name for name in first_log if not name.startswith("update")]
    begin = ["flush_cache", "release_memory_occupation", "release_memory_occupation"]
    publish = ["resume_memory_occupation", "flush_cache", "weights_checker", "resume_memory_occupation"]
    assert order[: len(begin + publish)] == begin + publish
    for name in ("release_memory_occupation", "resume_memory_occupation"):
        assert first_log.count(name) >= 6

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


def test_servers_that_die_and_hang_with_their_memory_given_up_change_nothing(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    stand_ins: Callable[..., list[str]],
) -> None:
    """One ends in the trainer's turn of step 1, its successor never answers in that of step 2: the bits are the same.

    The stand-ins generate the same tokens at any weights, and end when they are asked for what a real server would not
    survive: to generate without memory, or to take back what was not given up.
    """
    shared = [f"rl.steps={STEPS}", "evaluation.at_end=false", "reward.require_think=false", "checkpoint.every_steps=2"]
    launch = start(WORKER, CONFIG, [*rl_overrides("apart"), *shared, *stand_ins()])
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    colocated = ["sglang.placement=colocated", "weight_sync.timeout_seconds=4"]
    faulty = stand_ins("2.die", "3.hang")
    launch = start(WORKER, CONFIG, [*rl_overrides("faulty"), *shared, *faulty, *colocated])
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    output = launch.output()
    assert output.count("is back with the current weights") == 2
    assert "gave no answer to /resume_memory_occupation; it is ended, for its memory" in output
    assert "gave no answer to /release_memory_occupation; it is ended, for its memory" in output
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
