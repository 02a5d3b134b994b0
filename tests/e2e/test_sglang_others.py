"""Servers that no trainer owns (`sglang.urls`): they fall away and come back while the run goes on."""

from __future__ import annotations

import dataclasses
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config import load_settings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.model import hf_config
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.sglang import ServerFleet
from tests.e2e.served_runs import CONFIG, published, step_rows, wait_for

PER_STEP = 8
Overrides = Callable[[str], list[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def fleet_at(rl_overrides: Overrides, tmp_path: Path, sglang_settings: SglangSettings) -> Iterator[Callable[..., Any]]:
    """Makes a fleet of one server at a port, of the run's model or, with other sizes, of another one."""
    with ExitStack() as stack:

        def make(name: str, port: int, **sizes: int) -> ServerFleet:
            arch = load_settings(CONFIG, rl_overrides(name), entry="rl", world_size=2).architecture
            config = {**hf_config(arch, dtype="float32"), **sizes}
            settings = dataclasses.replace(sglang_settings, port=port)
            fleet = ServerFleet(
                settings, config, tmp_path / name, dtype="float32", on_cpu=True, batch_responses=32, longest_sequence=88
            )
            return stack.enter_context(fleet)

        yield make


def wait_until_said(launch: Any, text: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while text not in launch.output():
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.1)


def last_step(run: Path) -> int:
    return int(step_rows(run)[-1]["step"])


def test_a_server_of_others_leaves_comes_back_as_another_model_and_then_as_itself(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, fleet_at: Callable[..., ServerFleet]
) -> None:
    """Publishes go on with the other server; what answers in its place joins only if it is our model.

    Synchronous, so that every token is of the published version and must agree with the trainer.
    """
    run, ports = tmp_path / "guest", (free_port(), free_port())
    stays, leaves = fleet_at("stays", ports[0]), fleet_at("leaves", ports[1])
    for fleet in (stays, leaves):
        fleet.start(0)
    urls = ", ".join(f"http://127.0.0.1:{port}" for port in ports)
    overrides = [
        *rl_overrides("guest"), "evaluation.at_end=false", "reward.require_think=false", "sglang.stream_interval=4",
        "rollout.engine=sglang", f"sglang.urls=[{urls}]", "sglang.connect_seconds=180", "rl.steps=500",
        "scheduling.stall_seconds=30",
        "weight_sync.timeout_seconds=60", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    wait_for(2, run, launch)
    leaves.stop(0)
    wait_until_said(launch, "is to come back")
    wait_for(last_step(run) + 2, run, launch)

    # Of the same family and vocabulary: weights of ours would end it, and its config.json alone tells.
    imposter = fleet_at("imposter", ports[1], num_hidden_layers=3)
    imposter.start(0)
    wait_until_said(launch, f"({urls.split(', ')[1]}) cannot be used again: ")
    wait_until_said(launch, "num_hidden_layers 3, ours 2 (model.num_layers)")
    assert "serves again" not in launch.output()
    imposter.close()

    leaves.start(0)
    wait_until_said(launch, "serves again, with version")
    wait_for(last_step(run) + 2, run, launch)
    launch.signal(signal.SIGTERM)
    assert launch.wait(900) == [75, 75], launch.output()  # counted from the start

    steps = last_step(run)
    versions = published(launch)  # after a stop in the middle of the last step there is nobody to publish it to
    assert versions in (list(range(steps)), list(range(steps + 1)))
    assert launch.output().count("proved by checksum") == len(versions), "every publish reached and proved at least one"
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in step_rows(run))
    with LedgerReader(run / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        keys = [(g.epoch, g.prompt.prompt_id) for step in range(1, steps + 1) for g in reader.groups_of_step(step)]
    assert len(keys) == len(set(keys)) == steps * PER_STEP
    log = (tmp_path / "leaves" / "logs" / "engine_0.log").read_text(errors="replace")
    assert log.count("POST /continue_generation ") >= 2, "it was published to again after it had been restored"
