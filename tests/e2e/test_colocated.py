"""Trainer and servers take turns on the same machine: the same bits as apart, whoever dies in whose turn."""

from __future__ import annotations

import json
import re
import signal
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
    assert [(row["step"], row["phase"]) for row in rows if row["phase"] == "eval"] == [
        (s, "eval") for s in (0, 1, 2, 3)
    ]
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


def test_with_a_real_server_log_probabilities_prove_a_publish_in_the_engines_turn(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    """As servers that quantise need it: the ranks compute, with weights alone, while the engines have their memory."""
    overrides = [
        *rl_overrides("proved"), "rl.steps=2", "checkpoint.every_steps=1", "evaluation.at_end=false",
        "reward.require_think=false", "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}",
        "sglang.placement=colocated", "weight_sync.verify=logprobs", "weight_sync.logprob_tolerance=1.0e-3",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    assert launch.output().count("proved by logprobs") == 3
    rows = [json.loads(line) for line in (tmp_path / "proved" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in rows if row["phase"] == "rl")
    asked = calls(tmp_path / "proved" / "logs" / "engine_0.log")
    assert "weights_checker" not in asked
    assert asked.count("release_memory_occupation") > 4


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
    assert "/release_memory_occupation: no answer in time" in launch.output()
    assert "is ended, for its memory" in launch.output()
    assert "is back with the current weights" in launch.output()
    assert differing(tmp_path / "apart", tmp_path / "faulty") == []
    with LedgerReader(tmp_path / "faulty" / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []


def test_a_server_that_is_lost_in_the_last_call_of_a_publish_is_ended_and_comes_back(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    stand_ins: Callable[..., list[str]],
) -> None:
    """Its weights are proved, and their version is set: but nobody would have it give its memory up any more."""
    run = tmp_path / "dropped"
    launch = start(
        WORKER, CONFIG, [
            *rl_overrides("dropped"), "rl.steps=2", "evaluation.at_end=false", "reward.require_think=false",
            "sglang.placement=colocated", *stand_ins("2.drop"),
        ],
    )  # fmt: skip
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    after = re.findall("DROPPED|TOKENS|/update_weights_from_disk", (run / "logs" / "engine_0.log").read_text())
    after = after[after.index("DROPPED") + 1 :]
    assert after[0] == "/update_weights_from_disk", "it served outside of those that are published to"
    assert "TOKENS" in after
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []


HOSTS = ("127.0.0.1", "127.0.0.2")


def offers(log: Path) -> set[int]:
    """Processes whose shared memory a stand-in was given weights in."""
    return {int(pid) for line in re.findall(r"^OFFER (.*)$", log.read_text(), re.MULTILINE) for pid in line.split()}


def test_on_two_machines_every_server_is_given_the_weights_of_its_own_machines_ranks(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    stand_ins: Callable[..., list[str]],
) -> None:
    """A server, too, that is lost in the trainer's turn and comes back; the bits are those of one machine."""
    shared = [f"rl.steps={STEPS}", "evaluation.at_end=false", "reward.require_think=false", "checkpoint.every_steps=1"]
    launch = start(WORKER, CONFIG, [*rl_overrides("apart"), *shared, *stand_ins()])
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    colocated = ["sglang.placement=colocated", "sglang.offload_weights=true"]
    launch = start(WORKER, CONFIG, [*rl_overrides("two"), *shared, *stand_ins("3.die"), *colocated], hosts=HOSTS)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    run = tmp_path / "two"
    assert [offers(run / "logs" / f"engine_{i}.log") for i in range(2)] == [{p.pid} for p in launch.processes]
    assert "is back with the current weights" in launch.output()
    assert differing(tmp_path / "apart", run) == []
    rows = [json.loads(line) for line in (run / "logs" / "memory.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in rows if row["turn"] == "engines" and row["trainer_bytes"] == 0} == {0, 1}


def test_on_two_machines_real_servers_hold_what_was_published(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    overrides = [
        *rl_overrides("two"), "rl.steps=2", "checkpoint.every_steps=1", "evaluation.at_end=false",
        "reward.require_think=false", "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}",
        "sglang.placement=colocated", "sglang.offload_weights=true",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides, hosts=HOSTS)
    assert launch.wait(LIMIT) == [0, 0], launch.output()
    assert launch.output().count("proved by checksum") == 3
    assert "weights do not go to the engines by handles" not in launch.output()
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in rows if row["phase"] == "rl")
    for number in range(2):
        log = tmp_path / "two" / "logs" / f"engine_{number}.log"
        assert calls(log).count("weights_checker") == 3
        assert "POST /generate HTTP" in log.read_text(errors="replace")


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
