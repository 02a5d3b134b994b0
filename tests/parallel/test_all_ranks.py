"""Ranks that take longer than an exchange may wait for them; those that went silent are named."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_klear.parallel import AllRanks

SIZE, LIMIT = 3, 1.5


def rank_main(case: str, rank: int, port: int, results: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, SIZE, is_master=rank == 0)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=limit)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, size=SIZE))
    beats: list[float] = []
    ranks = AllRanks(context, silence_seconds=LIMIT, beat=lambda: beats.append(time.monotonic()))
    try:
        outcome: Any = getattr(Cases, case)(ranks, rank)
    except Exception as error:
        outcome = (type(error).__name__, str(error))
    results.put((rank, outcome, len(beats)))
    time.sleep(2.0)  # the store lives on the first rank


class Cases:
    """What a rank does with its AllRanks."""

    @staticmethod
    def slow(ranks: AllRanks, rank: int) -> Any:
        """In turn one rank works for longer than an exchange waits, and the exchange after it goes well."""
        found = []
        for turn in range(SIZE):
            end = time.monotonic() + (2.5 * LIMIT if turn == rank else 0.0)
            while time.monotonic() < end:
                ranks.alive()
                time.sleep(0.1)
            ranks.meet("work")
            parts: list[Any] = [None] * SIZE
            dist.all_gather_object(parts, (turn, rank))
            found.append(parts)
        return found

    @staticmethod
    def stopping(ranks: AllRanks, rank: int) -> Any:
        """One rank is asked to stop in the second of three turns; the others hear of it while they work."""
        heard = []
        for turn in range(3):
            end = time.monotonic() + 5 * LIMIT
            while not (stop := ranks.is_any_asked_to_stop(asked=turn == 1 and rank == 1)):
                ranks.alive()
                time.sleep(0.05)
                if turn != 1 and time.monotonic() > end - 4 * LIMIT:
                    break
                assert time.monotonic() < end
            heard.append(stop)
            ranks.meet("work")
        return heard

    @staticmethod
    def silent(ranks: AllRanks, rank: int) -> Any:
        if rank == 1:
            time.sleep(3 * LIMIT)
        ranks.meet("generate")
        return "met"

    @staticmethod
    def killed(ranks: AllRanks, rank: int) -> Any:
        if rank == 2:
            os._exit(1)
        ranks.meet("generate")
        return "met"

    @staticmethod
    def first_killed(ranks: AllRanks, rank: int) -> Any:
        if rank == 0:
            time.sleep(0.5)
            os._exit(1)
        ranks.meet("generate")
        return "met"


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
            rank, outcome, beats = results.get(timeout=60)
            found[rank] = (outcome, beats)
    except queue.Empty:
        pytest.fail(f"only ranks {sorted(found)} answered")
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return found


def test_a_rank_may_take_longer_than_an_exchange_waits() -> None:
    expected = [[(turn, rank) for rank in range(SIZE)] for turn in range(SIZE)]
    for outcome, beats in run("slow").values():
        assert outcome == expected
        assert beats >= 10, "this rank lives while it waits"


def test_ranks_hear_that_another_is_asked_to_stop_until_they_have_met() -> None:
    assert [outcome for outcome, _ in run("stopping").values()] == [[False, True, False]] * SIZE


def test_a_silent_rank_is_named_and_those_that_wait_are_not() -> None:
    found = run("silent")
    for rank in (0, 2):
        kind, text = found[rank][0]
        assert kind == "RolloutError"
        assert text.startswith("rank 1 gave no sign of life for 2 s while it was to generate, and 2 of 3 ranks wait")
        assert "(parallel.timeout_seconds)" in text


def test_a_rank_that_was_killed_is_named() -> None:
    for outcome, _ in run("killed", answering=2).values():
        assert outcome[0] == "RolloutError"
        assert outcome[1].startswith("rank 2 gave no sign of life")


def test_the_end_of_the_rank_that_keeps_the_store_is_told_at_once() -> None:
    for outcome, _ in run("first_killed", answering=2).values():
        assert outcome == ("RolloutError", "the first rank ended while others were to generate")
