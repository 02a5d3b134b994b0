"""Machines of a launch: what the first rank has done elsewhere, with errors, silence and strangers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.parallel import Machines, SilentMachine
from megatron_klear.parallel import machines as calls

LOCAL_RANKS = (0, 1, 0, 0)
"""Three machines: two processes on the first, one on each of the others."""


def rank_main(rank: int, port: int, results: Any) -> None:
    os.environ.update(LOCAL_RANK=str(LOCAL_RANKS[rank]), MASTER_ADDR="127.0.0.1")
    size = len(LOCAL_RANKS)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, size=size))
    machines = Machines(context)
    gone = threading.Event()

    def wait_for_ever(waiting: Any) -> None:
        try:
            while True:
                waiting()
                time.sleep(0.02)
        except RolloutError:
            gone.set()
            raise

    def refuse(_: Any) -> None:
        raise ConfigError(["sglang.venv: none here", "sglang.port: taken"])

    def stop_itself(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1.0)  # the stop may reach another thread first, and this one must not answer meanwhile

    calls._SIGN_SECONDS, calls._SILENCE_SECONDS = 0.2, 2.0
    if machines.is_leader:
        machines.offer("work", lambda seconds, _: time.sleep(seconds))
        machines.offer("stop", stop_itself)
        machines.offer("tell its pid", lambda *given: (os.getpid(), given[:-1]))
        threading.Timer(2.0 if rank == 2 else 0.0, machines.offer, ("refuse", refuse)).start()  # called before
        machines.offer("fail", lambda _: 1 // 0)
        machines.offer("wait", wait_for_ever)
        machines.offer("end", lambda _: os._exit(3))
    results.put((rank, "place", (machines.number, machines.count, machines.is_leader, machines.pids, os.getpid())))
    dist.barrier()
    try:
        if rank == 0:
            results.put((0, "told", first_rank_calls(machines)))
            dist.distributed_c10d._get_default_store().set("done", "1")
        elif rank == 3:
            # It sits outside of any collective: calls are answered all the same.
            results.put((3, "given up", gone.wait(20.0)))
            time.sleep(60.0)
        else:
            dist.distributed_c10d._get_default_store().wait(["done"])
    finally:
        machines.close()


def first_rank_calls(machines: Machines) -> dict[str, Any]:
    told: dict[str, Any] = {
        "pids": [machines.call(m, "tell its pid", m, {"any": b"kind"}) for m in range(machines.count)],
        "large": len(machines.call(2, "tell its pid", "x" * 5_000_000)[1][0]),
    }
    for name in ("refuse", "fail"):
        try:
            machines.call(1, name)
        except Exception as error:
            told[name] = (type(error).__name__, str(error))
    began = time.monotonic()

    def give_up() -> None:
        if time.monotonic() - began > 0.5:
            raise RolloutError("no more patience")

    try:
        machines.call(2, "wait", waiting=give_up)
    except RolloutError as error:
        told["wait"] = str(error)
    # At work for longer than a machine may be silent; and longer than this call may take.
    told["work"] = machines.call(2, "work", 4.0)
    for name, limit in (("work", 1.0), ("stop", 60.0)):
        began = time.monotonic()
        try:
            machines.call(2, name, *([30.0] if name == "work" else []), limit_seconds=limit)
        except SilentMachine as error:
            told[f"{name} silently"] = (str(error), time.monotonic() - began)
    os.kill(told["pids"][2][0], signal.SIGCONT)
    told["stranger"] = what_a_stranger_gets(machines)
    time.sleep(0.5)
    try:
        machines.call(2, "end")
    except RolloutError as error:
        told["end"] = str(error)
    return told


def what_a_stranger_gets(machines: Machines) -> str:
    """One who does not know the key sends a call at once, and is not even listened to."""
    address, port = machines._places[2]
    with Connection(socket.create_connection((address, port)).detach()) as connection:
        connection.recv_bytes()  # the challenge
        connection.send_bytes(b"\x80\x04N.")  # a pickle in the place of an answer to it
        return connection.recv_bytes().decode(errors="replace")


@pytest.fixture(scope="module")
def told() -> dict[tuple[int, str], Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=rank_main, args=(rank, port, results)) for rank in range(len(LOCAL_RANKS))]
    for process in ranks:
        process.start()
    try:
        found = [results.get(timeout=90) for _ in range(len(LOCAL_RANKS) + 2)]
    finally:
        for process in ranks:
            process.join(90)
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0, 0, 3]
    return {(rank, what): value for rank, what, value in found}


def test_local_ranks_say_who_shares_a_machine(told: dict[tuple[int, str], Any]) -> None:
    places = [told[rank, "place"] for rank in range(4)]
    pids = [place[4] for place in places]
    assert [place[:3] for place in places] == [(0, 3, True), (0, 3, False), (1, 3, True), (2, 3, True)]
    assert [place[3] for place in places] == [(pids[0], pids[1]), (pids[0], pids[1]), (pids[2],), (pids[3],)]


def test_each_machine_answers_with_what_it_was_given(told: dict[tuple[int, str], Any]) -> None:
    pids = [told[rank, "place"][4] for rank in (0, 2, 3)]
    assert told[0, "told"]["pids"] == [(pid, (m, {"any": b"kind"})) for m, pid in enumerate(pids)]
    assert told[0, "told"]["large"] == 5_000_000


def test_errors_arrive_as_what_they_are(told: dict[tuple[int, str], Any]) -> None:
    kind, text = told[0, "told"]["refuse"]
    assert kind == "ConfigError"
    assert "sglang.venv: none here" in text
    assert "sglang.port: taken" in text
    assert told[0, "told"]["fail"] == (
        "RolloutError", "machine 1 (127.0.0.1) failed: ZeroDivisionError: integer division or modulo by zero"
    )  # fmt: skip


def test_a_call_that_is_given_up_ends_there_too(told: dict[tuple[int, str], Any]) -> None:
    assert told[0, "told"]["wait"] == "no more patience"
    assert told[3, "given up"]


def test_a_machine_that_ends_is_named(told: dict[tuple[int, str], Any]) -> None:
    assert told[0, "told"]["end"].startswith("machine 2 (127.0.0.1) did not end: ")


def test_a_machine_at_work_is_waited_for_up_to_the_limit_of_the_call(told: dict[tuple[int, str], Any]) -> None:
    assert told[0, "told"]["work"] is None
    text, seconds = told[0, "told"]["work silently"]
    expected = "machine 2 (127.0.0.1) did not work: TimeoutError: it took the call and gave no answer within 1 s"
    assert text == expected
    assert 1.0 <= seconds < 10.0


def test_a_machine_that_is_stopped_in_the_midst_of_a_call_is_named(told: dict[tuple[int, str], Any]) -> None:
    text, seconds = told[0, "told"]["stop silently"]
    assert text.endswith("it took the call and gave no sign of life for 2 s")
    assert 2.0 <= seconds < 20.0


def test_a_stranger_is_turned_away(told: dict[tuple[int, str], Any]) -> None:
    assert "FAILURE" in told[0, "told"]["stranger"]


def test_a_machine_that_takes_a_call_and_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does for a process that is stopped."""
    monkeypatch.setattr("megatron_klear.parallel.machines._CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        caller = Machines.__new__(Machines)
        caller._key, caller._places = b"k" * 32, [("", 0), ("127.0.0.1", silent.getsockname()[1])]
        with pytest.raises(
            RolloutError, match=r"machine 1 \(127.0.0.1\) did not grade: TimeoutError: it takes the call"
        ):
            caller.call(1, "grade")


@pytest.mark.parametrize(
    ("first", "address"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("no.such.host.invalid", "127.0.0.1")],
)
def test_the_address_of_a_machine_is_of_the_kind_that_the_first_ranks_is(
    first: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", first)
    assert calls._address_towards_first() == address


def test_calls_go_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second machine that is known by an IPv6 address only, from listening to the answer."""
    monkeypatch.setenv("MASTER_ADDR", "::1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(Machines, "_shared_key", lambda *_: b"k" * 32)
    told: list[Any] = []

    def gathered(everyone: list[Any], own: Any) -> None:
        everyone[:] = [(0, 1, "::1", None, "first"), own]
        told.append(own)

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=1, size=2))
    second = Machines(context)
    try:
        assert second.address == "::1"
        second.offer("add", lambda a, b, _: a + b)
        first = Machines.__new__(Machines)
        first._key, first._places = b"k" * 32, second._places
        assert first.call(1, "add", 2, 3) == 5
    finally:
        second.close()
