"""Engines that are killed, or refuse, in the middle of a set leave nothing of it in the machine's shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_klear.errors import WeightSyncError
from megatron_klear.rollout.sglang import Connection
from megatron_klear.rollout.sglang.loop import LoopThread
from megatron_klear.rollout.sglang.serving import SglangCaller
from megatron_klear.weight_sync import EngineGroup, TensorTransport
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.checksums import verify
from megatron_klear.weight_sync.hashes import engine_hash

ROOT = Path(__file__).parents[2]
BUCKETS = 4
SECONDS = 60.0


def files() -> set[str]:
    """Shared memory that this process has made and torch has named."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")}


class Sending:
    """A transport to stand-ins of engines, each a process of its own."""

    def __init__(self, loop: LoopThread, processes: list[subprocess.Popen[str]]) -> None:
        self.processes, self.before, self.most = processes, files(), 0
        urls = [f"http://127.0.0.1:{process.stdout.readline().strip()}" for process in processes]  # type: ignore[union-attr]
        self.group = EngineGroup([SglangCaller(loop, Connection(url, url)) for url in urls], SECONDS)
        self.group.least = 1
        self.transport = TensorTransport(self.group, tp=1, by_value=False)

    def send(self, version: int) -> None:
        """Send a set, and have those that are left prove it."""
        sent = {f"w{i}": torch.full((2**18,), float(version + i)) for i in range(BUCKETS)}
        self.transport.begin(version)
        for name, tensor in sent.items():
            self.transport.send(Bucket(names=(name,), tensors=(tensor,)))
            self.most = max(self.most, len(files() - self.before))
        self.transport.finish()
        assert verify(self.group, [{name: engine_hash(tensor, "cpu") for name, tensor in sent.items()}])


@pytest.fixture
def sending() -> Iterator[Callable[..., Sending]]:
    """Make a `Sending` with one engine for each argument, its faults."""
    processes: list[subprocess.Popen[str]] = []
    loop = LoopThread("receivers")

    def make(*faults: str) -> Sending:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("receiver.py")), "0"]
        processes.extend(
            subprocess.Popen([*command, *fault.split()], env=environment, stdout=subprocess.PIPE, text=True)
            for fault in faults
        )
        return Sending(loop, processes)

    yield make
    for process in processes:
        process.kill()
        process.wait()
    loop.close()


def test_an_engine_that_is_killed_in_a_set_leaves_no_bucket(sending: Callable[..., Sending]) -> None:
    """With a bucket that it has not read, and with one that is open; the others read on and prove every set."""
    made = sending("", "die@2", f"die@{BUCKETS + 3}mid", f"die@{2 * BUCKETS + BUCKETS}")
    for version in range(3):
        made.send(version)
        assert len(made.group.callers) == 3 - version
        assert files() == made.before
    made.send(3)
    assert made.most == 2, "the one that is loaded, and the one before"
    assert files() == made.before
    assert made.processes[0].poll() is None


def test_a_set_that_fails_is_removed_when_the_engines_that_live_have_opened_it(
    sending: Callable[..., Sending],
) -> None:
    made = sending("2@3", "refuse@2")  # the first has not opened the third bucket yet when the second is refused
    with pytest.raises(WeightSyncError, match=r"answered status 400: .*tired"):
        made.send(0)
    assert files() > made.before
    made.transport.close()
    assert files() == made.before
    answers = made.group.start("/weights_checker", {})  # which comes after the update that is under way
    answers.wait(SECONDS)
    assert answers.failures() == [], "an engine that finds no file ends"
    made.transport.close()


def test_engines_that_are_all_lost_need_no_shared_memory(sending: Callable[..., Sending]) -> None:
    made = sending("die@2")
    made.group.least = 0
    made.send(0)
    made.send(1)
    assert files() == made.before
