"""A broadcast whose receivers die, hang or refuse: the others get the whole set again, in bounded time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.errors import WeightSyncError
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.rollout.sglang.connection import Connection
from megatron_klear.rollout.sglang.loop import LoopThread
from megatron_klear.rollout.sglang.serving import SglangCaller
from megatron_klear.weight_sync import (
    DistributedTransport,
    EngineGroup,
    EngineLayout,
    Publisher,
    PublishReport,
    broadcast_group,
)
from megatron_klear.weight_sync.broadcast_group import BroadcastGroup

ROOT = Path(__file__).parents[2]
BUCKET_BYTES = 12 * 2**20
"""More than sockets hold, so that a receiver can be gone while the rest is on its way."""
NAMES = [f"model.layers.{i}.self_attn.q_norm.weight" for i in range(3)]
SECONDS = 3.0
"""Limit of a broadcast, and of getting free of a group that is given up."""


def weights(version: int) -> dict[str, torch.Tensor]:
    """One tensor per bucket, no byte of it zero at the start."""
    return {name: torch.full((BUCKET_BYTES // 4,), 1.1 + version + i) for i, name in enumerate(NAMES)}


class Publishing:
    """A trainer of one rank and stand-ins of engines."""

    def __init__(self, context: ParallelContext, loop: LoopThread, processes: list[subprocess.Popen[str]]) -> None:
        self.processes, self._loop = processes, loop
        urls = [f"http://127.0.0.1:{process.stdout.readline().strip()}" for process in processes]  # type: ignore[union-attr]
        self.callers = [SglangCaller(loop, Connection(f"engine {i}", url)) for i, url in enumerate(urls)]
        self.waited = 0
        self.group = EngineGroup(self.callers, SECONDS, waiting=self.wait)
        self.group.least = 1
        self.transport = DistributedTransport(self.group, tp=1, device=torch.device("cpu"))
        self.publisher = Publisher(
            self.group,
            self.transport,
            EngineLayout(tp=1, device="cpu", dtype="float32"),
            head_dim=2,
            context=context,
            first_rank=FirstRank(context, silence_seconds=5.0),
            bucket_bytes=BUCKET_BYTES,
            pause_mode="abort",
            verify_mode="checksum",
        )

    def wait(self) -> None:
        self.waited += 1

    def publish(self, version: int) -> PublishReport:
        return self.publisher.publish(weights(version).items(), version=version)

    def left(self) -> list[str]:
        return [caller.name for caller in self.group.callers]

    def seen(self, index: int) -> list[str]:
        """Paths that a living engine was asked, in order."""
        status, text = self.callers[index].start("/seen", {}, timeout_seconds=SECONDS).result()
        assert status == 200
        return [path.strip('" []') for path in text.split(",")]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    parallel.stop()
    yield parallel.start(ParallelSettings())
    parallel.stop()


@pytest.fixture
def publishing(context: ParallelContext) -> Iterator[Callable[..., Publishing]]:
    """Make a `Publishing` with one engine for each argument, its faults."""
    processes: list[subprocess.Popen[str]] = []
    made: list[Publishing] = []
    loop = LoopThread("receivers")

    def make(*faults: str) -> Publishing:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("receiver.py")), "0"]
        processes.extend(
            subprocess.Popen([*command, *fault.split()], env=environment, stdout=subprocess.PIPE, text=True)
            for fault in faults
        )
        made.append(Publishing(context, loop, processes))
        return made[-1]

    yield make
    for one in made:
        one.publisher.close()
    for process in processes:
        process.kill()
        process.wait()
    loop.close()


SET = ["/begin_weight_update", *["/update_weights_from_distributed"] * len(NAMES), "/end_weight_update"]
PROOF = ["/flush_cache", "/weights_checker", "/update_weight_version", "/continue_generation"]


@pytest.mark.parametrize(
    ("fault", "place"),
    [("die@4", 0), ("die@5", 0), ("die@5", 1), ("die@5mid", 0), ("stop@5mid", 1)],
)
def test_the_other_engine_gets_the_whole_set_again_and_serves_only_then(
    publishing: Callable[..., Publishing], fault: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The second publish is hit, at its first, second and last bucket."""
    made = publishing(*(["", fault] if place else [fault, ""]))
    stays, name = 1 - place, f"engine {place}"
    made.publish(0)
    assert made.left() == ["engine 0", "engine 1"]
    before, start = len(made.seen(stays)), time.monotonic()
    report = made.publish(1)
    # A death is seen at once; a hang after the limit, and is given as long to answer after all.
    found = "broken off|no connection" if "die" in fault else "no answer"
    assert re.search(rf"{name}: /update_weights_from_distributed: ({found}).*publishing goes on with 1 ", caplog.text)
    assert time.monotonic() - start < 6 * SECONDS, "longer than both limits, the set and a busy machine"
    assert (report.proof, report.version, report.num_bytes) == ("checksum", 1, len(NAMES) * BUCKET_BYTES)
    assert made.left() == [f"engine {stays}"]
    paths = made.seen(stays)[before:-1]
    assert paths[0] == "/pause_generation"
    whole = ["/init_weights_update_group", "/end_weight_update", *SET, *PROOF]
    assert paths[-len(whole) :] == whole, "it goes on when the set that was sent again is proved, and not before"
    assert paths.count("/destroy_weights_update_group") == 1
    assert paths.count("/continue_generation") == 1
    made.publish(2)
    assert made.seen(stays).count("/init_weights_update_group") == 2, "the new group is kept"


def test_an_engine_that_dies_at_the_last_bucket_takes_nothing_from_the_other(
    publishing: Callable[..., Publishing],
) -> None:
    """Whether or not the broadcast had ended when that was noticed, and so the set had to be sent again."""
    made = publishing("", "die@6mid")
    made.publish(0)
    assert made.publish(1).proof == "checksum"
    assert made.left() == ["engine 0"]
    assert made.seen(0)[-len(PROOF) - 1 : -1] == PROOF
    assert made.seen(0).count("/continue_generation") == 2


def test_three_engines_of_which_one_hangs_and_passes_nothing_on(
    publishing: Callable[..., Publishing],
) -> None:
    """Gloo sends along a tree, in which the last engine gets its bytes from the first one and then waits for it."""
    made = publishing("stop@5", "", "")
    made.publish(0)
    start = time.monotonic()
    assert made.publish(1).proof == "checksum"
    assert time.monotonic() - start < 8 * SECONDS
    assert "engine 0" not in made.left()
    assert "engine 1" in made.left()
    assert made.waited > SECONDS, "other ranks must hear that the first one lives"


def test_one_that_is_too_slow_is_left_out_though_it_answers(
    publishing: Callable[..., Publishing], caplog: pytest.LogCaptureFixture
) -> None:
    """It answers that it waits for a bucket in vain, as the group has been given up by then."""
    made = publishing(f"{1.5 * SECONDS}@5", "")
    made.publish(0)
    assert made.publish(1).proof == "checksum"
    assert made.left() == ["engine 1"]
    assert "engine 0: it took longer than 3 s (weight_sync.timeout_seconds); publishing goes on" in caplog.text


def test_a_second_loss_while_the_set_is_sent_again(publishing: Callable[..., Publishing]) -> None:
    made = publishing("die@5mid", "", "die@6")
    made.publish(0)
    assert made.publish(1).proof == "checksum"
    assert made.left() == ["engine 1"]


@pytest.mark.parametrize("faults", [("die@2",), ("die@2mid", "die@3")])
def test_with_no_engine_left_the_publish_ends_where_that_is_allowed(
    publishing: Callable[..., Publishing], faults: tuple[str, ...]
) -> None:
    made = publishing(*faults)
    made.group.least = 0
    assert made.publish(0).version == 0
    assert made.left() == []


@pytest.mark.parametrize(("fault", "least"), [("die@2mid", 1), ("die@2mid", None)])
def test_too_few_are_an_error_that_names_the_engine(
    publishing: Callable[..., Publishing], fault: str, least: int | None
) -> None:
    made = publishing(*([fault] if least else ["", fault]))
    made.group.least = least
    start = time.monotonic()
    name = "engine 0" if least else "engine 1"
    with pytest.raises(WeightSyncError, match=f"broadcasting weights to the engines failed: {name}: /update_weights"):
        made.publish(0)
    assert time.monotonic() - start < 6 * SECONDS
    assert made.publisher.version == -1
    if least is None:
        assert "/continue_generation" not in made.seen(0)


@pytest.mark.parametrize("place", ["join", "2"])
def test_an_engine_that_refuses_is_an_error_whoever_else_there_is(
    publishing: Callable[..., Publishing], place: str
) -> None:
    made = publishing("", f"refuse@{place}")
    with pytest.raises(WeightSyncError, match=r"engine 1: /\w+ answered status 400: .*tired"):
        made.publish(0)
    assert made.left() == ["engine 0", "engine 1"]


@pytest.mark.parametrize("fault", ["die@join", "stop@join"])
def test_one_that_is_lost_before_it_has_joined_is_done_without(
    publishing: Callable[..., Publishing], fault: str
) -> None:
    made = publishing(fault, "")
    start = time.monotonic()
    assert made.publish(0).proof == "checksum"
    assert time.monotonic() - start < 6 * SECONDS
    assert made.left() == ["engine 1"]


def test_a_loss_between_two_publishes_costs_nothing(publishing: Callable[..., Publishing]) -> None:
    made = publishing("", "")
    made.publish(0)
    made.processes[0].send_signal(signal.SIGKILL)
    made.processes[0].wait()
    made.publish(1)
    assert made.left() == ["engine 1"]
    assert made.seen(1).count("/begin_weight_update") == 2, "nothing was sent twice"


def test_a_set_that_is_sent_again_is_read_again_from_its_start(publishing: Callable[..., Publishing]) -> None:
    """On every rank: reading is a collective of the trainer's ranks."""
    made = publishing("", "die@2")
    read: list[str] = []

    class Read:
        def __iter__(self) -> Any:
            for name, tensor in weights(0).items():
                read.append(name)
                yield name, tensor

    made.publisher.publish(Read(), version=0)
    assert read == [*NAMES, *NAMES]


def test_a_group_that_two_threads_leave_is_ended_once(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread gives up while the one that joined finds that it has come too late."""
    both = threading.Barrier(2)

    class Slow(BroadcastGroup):
        """Who looks whether there is a group stays there until the other looks, too."""

        @property
        def _group(self) -> Any:
            found = self.__dict__.get("there")
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.3)
            return found

        @_group.setter
        def _group(self, group: Any) -> None:
            self.__dict__["there"] = group

    limits = {"join_seconds": SECONDS, "broadcast_seconds": SECONDS}
    group = Slow("alone", address="127.0.0.1", size=1, device=torch.device("cpu"), **limits)
    group.join().result(SECONDS)
    joined, ended = group.__dict__["there"], []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    both.reset()
    threads = [threading.Thread(target=group.abandon) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert ended == [joined], "None would be the group of all ranks"
    monkeypatch.undo()
    torch.distributed.destroy_process_group(joined)


@pytest.mark.parametrize("before", [None, "3"])
def test_joins_at_the_same_time_leave_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """NCCL reads there that failures are ours, and so would everything else in this process later."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    inside, may_end = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    seen: list[str | None] = []
    order = iter(range(2))

    def make(*_: Any, **__: Any) -> None:
        number = next(order)
        inside[number].set()
        may_end[number].wait(10.0)
        seen.append(os.environ.get(name))
        raise RuntimeError("there is no GPU here")

    monkeypatch.setattr(broadcast_group, "_new_process_group_helper", make)
    limits = {"join_seconds": SECONDS, "broadcast_seconds": SECONDS}
    joins = []
    for number in range(2):
        group = BroadcastGroup(str(number), address="127.0.0.1", size=1, device=torch.device("cuda"), **limits)
        joins.append(group.join())
        assert inside[number].wait(10.0)
    for number in range(2):
        may_end[number].set()
        with pytest.raises(RuntimeError, match="no GPU"):
            joins[number].result(10.0)
    assert seen == ["0", "0"]
    assert os.environ.get(name) == before
