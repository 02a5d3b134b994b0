"""Servers that are started anew beside training and publishing, with stand-ins for all that takes long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear.errors import ConfigError, RolloutError, WeightSyncError
from megatron_klear.rollout.manager import StartLimit
from megatron_klear.session.others import ServersOfOthers
from megatron_klear.session.restarting import EngineRestarts
from megatron_klear.session.serving import ServedEngine
from megatron_klear.session.turn import Turn
from megatron_klear.weight_sync import EngineGroup


class Caller:
    def __init__(self, name: str) -> None:
        self.name = name


class Way:
    """An endpoint."""

    def __init__(self, stand_in: StandIn, index: int) -> None:
        self.name, self._stand_in, self._index = stand_in.engines[index].endpoint.name, stand_in, index

    async def close(self) -> None:
        self._stand_in.done.append(f"close {self._stand_in.engines[self._index].endpoint.name}")


class StandIn:
    """Fleet and engine in one; what is done to it is noted in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.ends: list[str] = []
        self.ready = threading.Event()
        self.ready.set()
        self.engines = [self.connected("old 0"), self.connected("old 1")]

    def connected(self, name: str) -> Any:
        return SimpleNamespace(caller=Caller(name), endpoint=SimpleNamespace(name=name))

    def stop(self, index: int) -> str | None:
        self.done.append(f"stop {index}")
        return self.ends.pop() if self.ends else None

    def start(self, index: int) -> None:
        self.done.append(f"start {index}")

    def wait_ready(self, index: int, waiting: Callable[[], None]) -> None:
        while not self.ready.is_set():
            waiting()
            time.sleep(0.01)

    def url(self, index: int) -> str:
        return f"http://127.0.0.1:{index}"

    def connect(self, index: int, url: str) -> Any:
        return self.connected(f"new {index}")

    def replace(self, index: int, engine: Any) -> None:
        self.engines[index] = engine

    def another_endpoint(self, index: int) -> Any:
        return Way(self, index)


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


def restarts_of(
    stand_in: StandIn, bring_up: Callable[..., None], turn: Turn | None = None
) -> tuple[EngineRestarts, EngineGroup]:
    group = EngineGroup([engine.caller for engine in stand_in.engines], 5.0)
    return EngineRestarts(stand_in, stand_in, group, bring_up, turn), group  # type: ignore[arg-type]


async def restarted(restarts: EngineRestarts, endpoint: Any, why: str, seconds: float = 30.0) -> Any:
    async with StartLimit(seconds) as limit:
        return await restarts.restart(endpoint, why, limit)


def test_it_joins_those_published_to_when_it_has_the_current_weights(stand_in: StandIn) -> None:
    seen = []

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        seen.append((engine.endpoint.name, [caller.name for caller in group.callers]))

    restarts, group = restarts_of(stand_in, bring_up)
    endpoints = restarts.endpoints()
    fresh = asyncio.run(restarted(restarts, endpoints[1], "died"))
    assert seen == [("new 1", ["old 0"])], "while it starts nothing may be published to it"
    assert [caller.name for caller in group.callers] == ["old 0", "new 1"]
    assert stand_in.done == ["stop 1", "start 1", "close new 1"]
    again = asyncio.run(restarted(restarts, fresh, "died again"))
    assert again.name == "new 1"
    assert [caller.name for caller in group.callers] == ["old 0", "new 1"]
    restarts.close()


class Stopped(Exception):
    """The run is asked to stop."""


@pytest.mark.parametrize("is_of_others", [False, True])
def test_a_server_that_is_no_longer_waited_for_is_ended_where_it_is_ours(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, is_of_others: bool
) -> None:
    """The trainer may be about to take the memory of the GPUs that both use."""
    restarts, group = restarts_of(stand_in, lambda engine, waiting: None)
    if is_of_others:
        monkeypatch.setattr("megatron_klear.session.restarting.ServersOfOthers", StandIn)
    stand_in.ready.clear()
    asked = iter([False, False, True])

    def waiting() -> None:
        if next(asked):
            raise Stopped

    with pytest.raises(Stopped):
        restarts.restart_here(1, "does not answer", waiting, 30.0)
    assert stand_in.done == ["stop 1", "start 1", *([] if is_of_others else ["stop 1"])]
    assert [caller.name for caller in group.callers] == ["old 0"], "nothing is published to it"
    restarts.close()


@pytest.mark.parametrize(
    ("alive", "hanging", "failing", "resting", "asked", "error"),
    [
        ({0, 1}, set(), set(), set(), [], None),
        ({0, 1}, {1}, set(), set(), [(1, "brings no tokens")], None),
        ({1}, set(), {0}, set(), [(0, "does not answer")], None),
        ({1}, set(), set(), {0}, [], None),
        ({0, 1}, {0, 1}, {0}, {0, 1}, [(0, "brings no tokens"), (1, "brings no tokens")], None),
        ({1}, {1}, set(), {0}, [(1, "brings no tokens")], None),
        (set(), set(), {0, 1}, {0}, [(0, "does not answer"), (1, "does not answer")], "server 0 stays away"),
    ],
)
def test_without_the_manager_lost_servers_are_brought_back_as_far_as_they_come(
    alive: set[int],
    hanging: set[int],
    failing: set[int],
    resting: set[int],
    asked: list[tuple[int, str]],
    error: str | None,
) -> None:
    """One that does not come back, as where nobody starts it, ends nothing while another works, nor is waited for."""
    tried: list[tuple[int, str]] = []

    def restart_here(index: int, why: str, waiting: Callable[[], None], seconds: float) -> None:
        tried.append((index, why))
        if index in failing:
            raise RolloutError(f"server {index} stays away")

    served: Any = SimpleNamespace(
        _brings_back=True,
        _engine=SimpleNamespace(engines=("a", "b"), answering=lambda version: sorted(alive), hanging=hanging),
        _restarts=SimpleNamespace(restart_here=restart_here, may_come_back=lambda index: index not in resting),
        policy_version=3,
        session=SimpleNamespace(settings=SimpleNamespace(sglang=SimpleNamespace(start_seconds=30.0))),
    )
    with pytest.raises(RolloutError, match=error) if error else contextlib.nullcontext():
        ServedEngine._bring_back_lost(served, lambda: None)
    assert tried == asked


def test_a_try_that_failed_is_not_made_again_soon(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others work, which wait for it meanwhile; one that is back is as any."""
    now = 1000.0
    monkeypatch.setattr("megatron_klear.session.restarting.time", SimpleNamespace(monotonic=lambda: now))
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)

    def wait_ready(index: int, waiting: Callable[[], None]) -> None:
        nonlocal now
        now += 30.0
        if len(stand_in.done) < 4:
            raise RolloutError("it does not start")

    monkeypatch.setattr(stand_in, "wait_ready", wait_ready)
    assert restarts.may_come_back(1)
    with pytest.raises(RolloutError, match="does not start"):
        restarts.restart_here(1, "does not answer", lambda: None, 300.0)
    found = {}
    for later in (1.0, 269.0, 271.0):
        now = 1030.0 + later
        found[later] = restarts.may_come_back(1)
    assert found == {1.0: False, 269.0: False, 271.0: True}
    restarts.restart_here(1, "does not answer", lambda: None, 300.0)
    assert restarts.may_come_back(1)
    restarts.close()


def test_a_server_of_others_is_tried_only_where_a_process_listens(stand_in: StandIn) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        urls = [f"http://127.0.0.1:{listening.getsockname()[1]}", "http://127.0.0.1:9"]
        group = EngineGroup([engine.caller for engine in stand_in.engines], 5.0)
        made = EngineRestarts(ServersOfOthers(urls), stand_in, group, lambda engine, waiting: None)  # type: ignore[arg-type]
        assert [made.may_come_back(index) for index in (0, 1)] == [True, False]
        made.close()


KILLED = "ended with status 137; the end of logs/engine_1.log:\nloading"
BROKEN = "ended with status 134; the end of logs/engine_1.log:\nCUDA error"


async def ends_told(restarts: EngineRestarts, told: list[str]) -> None:
    """Restart number 1, and add what the manager is told that its process ended with."""
    async with StartLimit(30.0, on_end=told.append) as limit:
        await restarts.restart(restarts.endpoints()[1], "no connection", limit)


@pytest.mark.parametrize("ended", ["itself", "elsewhere", "not"])
def test_what_the_lost_server_died_of_is_told(stand_in: StandIn, caplog: pytest.LogCaptureFixture, ended: str) -> None:
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)
    if ended == "itself":
        stand_in.ends = [KILLED]
    elif ended == "elsewhere":  # the trainer needed its memory
        restarts.note_end(1, KILLED)
    told: list[str] = []
    asyncio.run(ends_told(restarts, told))
    assert told == ([] if ended == "not" else [KILLED])
    assert (f"old 1 {KILLED}" in caplog.messages) == (ended != "not")
    restarts.close()


def test_what_a_server_died_of_that_was_being_brought_up_is_told(stand_in: StandIn) -> None:
    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        stand_in.ends = [BROKEN]
        raise WeightSyncError("no connection")

    turn = Turn()
    turn.give()
    restarts, _ = restarts_of(stand_in, bring_up, turn)
    told: list[str] = []
    with pytest.raises(WeightSyncError):
        asyncio.run(ends_told(restarts, told))
    assert told == [BROKEN]
    restarts.close()


def test_it_waits_for_a_publish_and_a_publish_for_it(stand_in: StandIn) -> None:
    bringing, may_end = threading.Event(), threading.Event()

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        bringing.set()
        may_end.wait(10.0)

    restarts, group = restarts_of(stand_in, bring_up)
    endpoint = restarts.endpoints()[0]
    restarting = threading.Thread(target=lambda: asyncio.run(restarted(restarts, endpoint, "died")))
    with restarts.publishing(lambda: None):
        restarting.start()
        assert not bringing.wait(0.5), "it must not load weights that are on their way out"
    assert bringing.wait(10.0)
    waits: list[int] = []

    def waiting() -> None:
        waits.append(len(group.callers))
        may_end.set()

    with restarts.publishing(waiting):
        assert len(group.callers) == 2
    assert waits
    assert waits[0] == 1
    restarting.join(10.0)
    restarts.close()


def test_on_gpus_that_are_shared_it_starts_in_the_engines_turn_which_lasts_until_it_has_joined(
    stand_in: StandIn,
) -> None:
    """Killed while its memory is the trainer's: it is gone at once, and back when there is memory for it."""
    turn = Turn()
    stand_in.ready.clear()
    restarts, group = restarts_of(stand_in, lambda engine, waiting: None, turn)
    endpoint = restarts.endpoints()[0]
    restarting = threading.Thread(target=lambda: asyncio.run(restarted(restarts, endpoint, "died")))
    restarting.start()
    try:
        while len(group.callers) == 2:
            time.sleep(0.01)
        assert [caller.name for caller in group.callers] == ["old 1"]
        time.sleep(0.5)
        assert stand_in.done == ["stop 0"]
        turn.give()
        while "start 0" not in stand_in.done:
            time.sleep(0.01)
        turn.take(stand_in.ready.set)
        assert [caller.name for caller in group.callers] == ["old 1", "new 0"]
    finally:
        stand_in.ready.set()
        restarts.close()
        restarting.join(10.0)


def test_a_start_is_given_up_and_its_memory_free_before_a_trainer_that_is_stopping_takes_its_turn(
    stand_in: StandIn,
) -> None:
    turn = Turn()
    turn.give()
    stand_in.ready.clear()
    restarts, group = restarts_of(stand_in, lambda engine, waiting: None, turn)
    endpoint = restarts.endpoints()[0]
    restarting = ThreadPoolExecutor(1).submit(asyncio.run, restarted(restarts, endpoint, "died"))
    while "start 0" not in stand_in.done:
        time.sleep(0.01)
    began = time.monotonic()
    turn.take(lambda: None, lambda: True)
    assert time.monotonic() - began < 5.0, "a start may take half an hour"
    assert stand_in.done == ["stop 0", "start 0", "stop 0"]
    with pytest.raises(RolloutError, match="restart of server 0 was given up"):
        restarting.result(10.0)
    assert [caller.name for caller in group.callers] == ["old 1"]
    restarts.close()


@pytest.mark.parametrize("others", ["turn", "publish"])
def test_only_the_servers_own_start_is_limited(stand_in: StandIn, others: str) -> None:
    """The trainer's turn, or a publish, is three times as long as a start may take."""
    turn = Turn() if others == "turn" else None
    restarts, group = restarts_of(stand_in, lambda engine, waiting: None, turn)
    endpoint = restarts.endpoints()[0]
    with restarts.publishing(lambda: None) if turn is None else contextlib.nullcontext():
        restarting = ThreadPoolExecutor(1).submit(asyncio.run, restarted(restarts, endpoint, "died", seconds=1.0))
        time.sleep(3.0)
        assert not restarting.done()
    if turn is not None:
        turn.give()
    assert restarting.result(10.0).name == "new 0"
    assert len(group.callers) == 2
    stand_in.ready.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(restarted(restarts, restarts.endpoints()[1], "died", seconds=0.5))
    restarts.close()


def test_a_server_that_cannot_be_proved_stays_out(stand_in: StandIn) -> None:
    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        raise WeightSyncError("new 0: 1 differ: model.norm.weight")

    restarts, group = restarts_of(stand_in, bring_up)
    with pytest.raises(WeightSyncError, match="1 differ"):
        asyncio.run(restarted(restarts, restarts.endpoints()[0], "died"))
    assert [caller.name for caller in group.callers] == ["old 1"]
    assert stand_in.done == ["stop 0", "start 0", "stop 0"], "it would hold its GPU and serve nobody"
    with restarts.publishing(lambda: None):
        pass  # the failure left nothing locked
    restarts.close()


def test_a_server_that_ends_as_soon_as_it_was_back_is_no_bad_input(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks bring it back themselves, whose ConfigError would end the run with the status of a wrong setting."""

    def connect(index: int, url: str) -> Any:
        stand_in.ends.append("ended with status -9; the end of LOG")
        raise ConfigError(["sglang.servers: engine 0: /server_info: no connection"])

    monkeypatch.setattr(stand_in, "connect", connect)
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)
    with pytest.raises(
        RolloutError, match=r"(?s)old 0 cannot be brought back: .*no connection.*; it ended with status -9"
    ):
        restarts.restart_here(0, "does not answer", lambda: None, 5.0)
    assert stand_in.done == ["stop 0", "start 0", "stop 0"]
    restarts.close()


def test_a_publish_of_a_run_that_is_to_stop_does_not_wait_for_a_server_that_joins(stand_in: StandIn) -> None:
    joins = threading.Event()

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        joins.set()
        while True:  # it hangs, for as long as weight_sync.timeout_seconds
            waiting()
            time.sleep(0.01)

    restarts, group = restarts_of(stand_in, bring_up)

    async def run() -> None:
        work = asyncio.ensure_future(restarted(restarts, restarts.endpoints()[0], "died"))
        await asyncio.to_thread(joins.wait, 10.0)
        waits = 0

        def waiting() -> None:
            nonlocal waits
            waits += 1

        def publish() -> None:
            with restarts.publishing(waiting, is_urgent=lambda: waits >= 3):
                assert [caller.name for caller in group.callers] == ["old 1"]

        await asyncio.wait_for(asyncio.to_thread(publish), 10.0)
        assert waits >= 3, "until then it is worth to wait"
        with pytest.raises(RolloutError, match="given up"):
            await work

    asyncio.run(run())
    restarts.close()


def test_one_that_comes_back_after_it_was_given_up_stays_out(stand_in: StandIn) -> None:
    may_end = threading.Event()
    restarts, group = restarts_of(stand_in, lambda engine, waiting: may_end.wait(10.0))  # type: ignore[arg-type,return-value]
    with pytest.raises(TimeoutError):
        asyncio.run(restarted(restarts, restarts.endpoints()[0], "died", seconds=0.5))
    may_end.set()
    with restarts.publishing(lambda: None):  # its end has been waited for
        assert [caller.name for caller in group.callers] == ["old 1"]
        assert stand_in.engines[0].endpoint.name == "old 0"
    restarts.close()


def test_an_endpoint_that_another_one_replaces_is_let_go(stand_in: StandIn) -> None:
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)
    endpoint = restarts.endpoints()[0]
    first = weakref.ref(endpoint)
    for _ in range(3):
        endpoint = asyncio.run(restarted(restarts, endpoint, "died"))
    gc.collect()
    assert first() is None
    restarts.close()


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_restart_is_given_up_at_once(stand_in: StandIn, how: str) -> None:
    stand_in.ready.clear()
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)
    endpoint = restarts.endpoints()[0]

    async def restart() -> None:
        work = asyncio.ensure_future(restarted(restarts, endpoint, "died"))
        await asyncio.sleep(0.2)
        if how == "cancelled":
            work.cancel()
        else:
            await asyncio.to_thread(restarts.close)
        await work

    with pytest.raises(asyncio.CancelledError if how == "cancelled" else RolloutError):
        asyncio.run(restart())
    began = time.monotonic()
    restarts.close()
    assert time.monotonic() - began < 5.0
    stand_in.ready.set()
    # Whoever closes the restarts ends all servers; one that was given up before is ended at once.
    assert stand_in.done[:2] == ["stop 0", "start 0"]
    assert stand_in.done[2:] in ([], ["stop 0"] if how == "cancelled" else [])


def test_a_server_of_others_is_waited_for_and_taken_in_when_it_answers_at_its_url(stand_in: StandIn) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/model_info" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    brought_up: list[str] = []
    group = EngineGroup([engine.caller for engine in stand_in.engines], 5.0)
    others = ServersOfOthers([url, "http://127.0.0.1:1"])

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        brought_up.append(engine.endpoint.name)

    restarts = EngineRestarts(others, stand_in, group, bring_up)  # type: ignore[arg-type]
    endpoint = restarts.endpoints()[0]
    absences: list[bool] = []

    async def come_back() -> None:
        async with StartLimit(0.4, absences.append) as limit:  # the absence does not count
            await restarts.restart(endpoint, "no answer", limit)
        assert limit.is_of_others

    waiting = threading.Thread(target=lambda: asyncio.run(come_back()))
    waiting.start()
    time.sleep(1.0)
    assert brought_up == []
    assert absences == [True]
    with restarts.publishing(lambda: None):
        assert [caller.name for caller in group.callers] == ["old 1"], "a publish goes on without it"
    server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        waiting.join(30.0)
        assert brought_up == ["new 0"]
        assert [caller.name for caller in group.callers] == ["old 1", "new 0"]
        assert absences == [True, False]
    finally:
        restarts.close()
        server.shutdown()
        serving.join()
        server.server_close()
