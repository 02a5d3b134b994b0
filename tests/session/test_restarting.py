"""Servers that are started anew beside training and publishing, with stand-ins for all that takes long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear.errors import RolloutError, WeightSyncError
from megatron_klear.session.restarting import EngineRestarts
from megatron_klear.session.turn import Turn
from megatron_klear.weight_sync import EngineGroup


class Caller:
    def __init__(self, name: str) -> None:
        self.name = name


class StandIn:
    """Fleet and engine in one; what is done to it is noted in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.ready = threading.Event()
        self.ready.set()
        self.engines = [self.connected("old 0"), self.connected("old 1")]

    def connected(self, name: str) -> Any:
        return SimpleNamespace(caller=Caller(name), endpoint=SimpleNamespace(name=name))

    def stop(self, index: int) -> None:
        self.done.append(f"stop {index}")

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
        async def close() -> None:
            self.done.append(f"close {self.engines[index].endpoint.name}")

        return SimpleNamespace(name=self.engines[index].endpoint.name, close=close)


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


def restarts_of(
    stand_in: StandIn, bring_up: Callable[..., None], turn: Turn | None = None
) -> tuple[EngineRestarts, EngineGroup]:
    group = EngineGroup([engine.caller for engine in stand_in.engines], 5.0)
    return EngineRestarts(stand_in, stand_in, group, bring_up, turn), group  # type: ignore[arg-type]


def test_it_joins_those_published_to_when_it_has_the_current_weights(stand_in: StandIn) -> None:
    seen = []

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        seen.append((engine.endpoint.name, [caller.name for caller in group.callers]))

    restarts, group = restarts_of(stand_in, bring_up)
    endpoints = restarts.endpoints()
    fresh = asyncio.run(restarts.restart(endpoints[1], "died"))
    assert seen == [("new 1", ["old 0"])], "while it starts nothing may be published to it"
    assert [caller.name for caller in group.callers] == ["old 0", "new 1"]
    assert stand_in.done == ["stop 1", "start 1", "close new 1"]
    again = asyncio.run(restarts.restart(fresh, "died again"))
    assert again.name == "new 1"
    assert [caller.name for caller in group.callers] == ["old 0", "new 1"]
    restarts.close()


def test_it_waits_for_a_publish_and_a_publish_for_it(stand_in: StandIn) -> None:
    bringing, may_end = threading.Event(), threading.Event()

    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        bringing.set()
        may_end.wait(10.0)

    restarts, group = restarts_of(stand_in, bring_up)
    endpoint = restarts.endpoints()[0]
    restarting = threading.Thread(target=lambda: asyncio.run(restarts.restart(endpoint, "died")))
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
    restarting = threading.Thread(target=lambda: asyncio.run(restarts.restart(endpoint, "died")))
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


def test_a_server_that_cannot_be_proved_stays_out(stand_in: StandIn) -> None:
    def bring_up(engine: Any, waiting: Callable[[], None]) -> None:
        raise WeightSyncError("new 0: 1 differ: model.norm.weight")

    restarts, group = restarts_of(stand_in, bring_up)
    with pytest.raises(WeightSyncError, match="1 differ"):
        asyncio.run(restarts.restart(restarts.endpoints()[0], "died"))
    assert [caller.name for caller in group.callers] == ["old 1"]
    with restarts.publishing(lambda: None):
        pass  # the failure left nothing locked
    restarts.close()


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_restart_is_given_up_at_once(stand_in: StandIn, how: str) -> None:
    stand_in.ready.clear()
    restarts, _ = restarts_of(stand_in, lambda engine, waiting: None)
    endpoint = restarts.endpoints()[0]

    async def restart() -> None:
        work = asyncio.ensure_future(restarts.restart(endpoint, "died"))
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
    assert stand_in.done == ["stop 0", "start 0"]
