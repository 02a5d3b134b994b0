"""Rank 0 works while the others look into the store: results and errors reach all, and silence is noticed."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_klear.errors import ConfigError, WeightSyncError
from megatron_klear.parallel import FirstRank

SIZE = 3


def rank_main(case: str, rank: int, port: int, results: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, SIZE, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, size=SIZE))
    beats: list[float] = []
    first = FirstRank(
        context,
        silence_seconds=1.5 if case in ("silent", "slow") else 20.0,
        beat=lambda: beats.append(time.monotonic()),
        is_asked_to_stop=lambda: case == "stop" and rank == 2,
    )
    try:
        outcome: Any = getattr(Cases, case)(first)
    except Exception as error:
        outcome = (type(error).__name__, str(error))
    results.put((rank, outcome, len(beats)))
    if case in ("result", "slow", "stop"):
        dist.barrier()


class Cases:
    """What a rank does with its FirstRank."""

    @staticmethod
    def result(first: FirstRank) -> Any:
        return [first.run("count", lambda i=i: {"n": i, "who": first._rank}) for i in range(20)]

    @staticmethod
    def slow(first: FirstRank) -> Any:
        def work() -> str:
            end = time.monotonic() + 4.0  # longer than may pass in silence
            while time.monotonic() < end:
                first.alive()
                time.sleep(0.1)
            return "done"

        return first.run("work", work)

    @staticmethod
    def stop(first: FirstRank) -> Any:
        def work() -> bool:
            end = time.monotonic() + 20.0
            while time.monotonic() < end and not first.is_stop_asked_for():
                first.alive()
                time.sleep(0.1)
            return first.is_stop_asked_for()

        return [first.run("work", work), first.run("work", work)]

    @staticmethod
    def silent(first: FirstRank) -> Any:
        return first.run("sleep", lambda: time.sleep(4.0))

    @staticmethod
    def config_error(first: FirstRank) -> Any:
        def fail() -> None:
            raise ConfigError(["a.b: wrong", "c.d: too"])

        return first.run("fail", fail)

    @staticmethod
    def sync_error(first: FirstRank) -> Any:
        def fail() -> None:
            raise WeightSyncError("1 differ: x")

        return first.run("fail", fail)

    @staticmethod
    def killed(first: FirstRank) -> Any:
        return first.run("end", lambda: os._exit(1))

    @staticmethod
    def surprise(first: FirstRank) -> Any:
        return first.run("divide", lambda: 1 / 0)


def run(case: str, answering: int = SIZE) -> dict[int, tuple[Any, int]]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=rank_main, args=(case, r, port, results)) for r in range(SIZE)]
    for process in ranks:
        process.start()
    found = {}
    try:
        for _ in range(answering):
            # Three processes import torch first, maybe on a busy machine.
            rank, outcome, beats = results.get(timeout=180)
            found[rank] = (outcome, beats)
    except queue.Empty:
        pytest.fail(f"only ranks {sorted(found)} answered")
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return found


def test_the_result_of_the_first_rank_is_everyones() -> None:
    expected = [{"n": i, "who": 0} for i in range(20)]
    assert {rank: outcome for rank, (outcome, _) in run("result").items()} == dict.fromkeys(range(SIZE), expected)


def test_others_wait_as_long_as_the_first_rank_is_alive_and_beat_meanwhile() -> None:
    found = run("slow")
    assert {outcome for outcome, _ in found.values()} == {"done"}
    assert all(beats >= 5 for _, beats in found.values())


def test_the_first_rank_learns_that_another_is_asked_to_stop() -> None:
    for outcome, _ in run("stop").values():
        assert outcome == [True, True]


def test_a_silent_first_rank_is_named() -> None:
    found = run("silent")
    for rank in (1, 2):
        kind, text = found[rank][0]
        assert kind == "RolloutError"
        assert "the first rank gave no sign of life for 2 s while it was to sleep (parallel.timeout_seconds)" in text


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [("config_error", "ConfigError", "a.b: wrong"), ("sync_error", "WeightSyncError", "1 differ: x")],
)
def test_errors_reach_every_rank_as_they_are(case: str, kind: str, text: str) -> None:
    for outcome, _ in run(case).values():
        assert outcome[0] == kind
        assert text in outcome[1]


def test_a_first_rank_that_was_killed_is_named_at_once() -> None:
    found = run("killed", answering=2)
    for outcome, _ in found.values():
        assert outcome == ("RolloutError", "the first rank ended while it was to end")


def test_an_unexpected_error_reaches_the_others_with_its_name() -> None:
    found = run("surprise")
    assert found[0][0] == ("ZeroDivisionError", "division by zero")
    assert found[1][0] == ("RolloutError", "the first rank failed: ZeroDivisionError: division by zero")
