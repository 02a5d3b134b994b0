"""What a connection makes of servers that are late or answer what cannot be read, and how it sends what is encoded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from megatron_klear.errors import WeightSyncError
from megatron_klear.records import EncodedJson
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang import Connection
from megatron_klear.rollout.sglang import connection as connection_module
from megatron_klear.rollout.sglang.answering import is_ready
from megatron_klear.rollout.sglang.loop import LoopThread
from megatron_klear.rollout.sglang.serving import SglangCaller
from megatron_klear.weight_sync import EngineGroup
from tests.rollout.sglang.conftest import Handler, StandIn, standing_in


def garbled(handler: Handler, body: dict[str, Any]) -> None:
    """Says that it is compressed, and is not."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b"plain")


async def streamed(connection: Connection) -> None:
    async for _ in connection.stream("/asked", {}):
        pass


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.get("/asked", timeout_seconds=5.0),
        lambda c: c.post("/asked", {}, timeout_seconds=5.0),
        lambda c: c.post_for_text("/asked", {}, timeout_seconds=5.0),
        lambda c: c.status("/asked", timeout_seconds=5.0),
        streamed,
    ],
    ids=["get", "post", "post_for_text", "status", "stream"],
)
def test_an_answer_in_a_broken_encoding_is_malformed(stand_in: StandIn, ask: Callable[[Connection], Any]) -> None:
    stand_in.answers["/asked"] = garbled

    async def run() -> None:
        connection = Connection("engine 0", stand_in.url)
        try:
            await ask(connection)
        finally:
            await connection.close()

    with pytest.raises(EndpointError, match=r"engine 0: malformed answer to /asked \(DecodingError: ") as error:
        asyncio.run(run())
    assert (error.value.retry, error.value.malformed) == (True, True)


def test_a_server_whose_answer_is_in_a_broken_encoding_is_not_ready(stand_in: StandIn) -> None:
    stand_in.answers["/model_info"] = garbled
    with httpx2.Client(trust_env=False) as client:
        assert not is_ready(client, stand_in.url)


def test_a_publish_tells_what_is_malformed_or_late_and_the_settings_name(stand_in: StandIn) -> None:
    loop, released = LoopThread("test"), threading.Event()
    try:
        caller = SglangCaller(loop, Connection("engine 0", stand_in.url))
        stand_in.answers["/flush_cache"] = garbled
        with pytest.raises(WeightSyncError, match="engine 0: malformed answer to /flush_cache"):
            EngineGroup([caller], 20.0).call("/flush_cache", {})
        group = EngineGroup([caller], 0.3)
        stand_in.answers["/flush_cache"] = lambda handler, body: released.wait(20)
        text = r"engine 0: /flush_cache: no answer in time \(0\.3 s, weight_sync\.timeout_seconds\)"
        with pytest.raises(WeightSyncError, match=text):
            group.call("/flush_cache", {})
    finally:
        released.set()
        loop.close()


def test_what_is_encoded_is_sent_as_it_is() -> None:
    sent = EncodedJson(b'{"a": [1, "' + b"x" * 3_000_000 + b'"], "b": null}')
    loop = LoopThread("test")
    try:
        with standing_in() as one, standing_in() as other:
            group = EngineGroup([SglangCaller(loop, Connection(e.url, e.url)) for e in (one, other)], 20.0)
            for engine in (one, other):
                engine.answers["/take"] = {}
            assert group.call("/take", sent) == [{}, {}]
            assert one.seen == other.seen == [("/take", {"a": [1, "x" * 3_000_000], "b": None})]
            assert dict(sent) == one.seen[0][1]
    finally:
        loop.close()


def test_a_connection_without_a_request_is_left_before_the_server_closes_it(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server closes an idle one after 5 s; a request that is sent at that moment would never be answered."""
    assert connection_module._KEPT_SECONDS < 5.0 / 2
    monkeypatch.setattr(connection_module, "_KEPT_SECONDS", 0.5)
    used: list[int] = []

    def note(handler: Handler, body: dict[str, Any]) -> None:
        used.append(handler.client_address[1])
        handler.reply(200, {})

    stand_in.answers["/asked"] = note

    async def run() -> None:
        connection = Connection("engine 0", stand_in.url)
        for pause in (0.0, 0.0, 1.0):
            await asyncio.sleep(pause)
            await connection.post("/asked", {}, timeout_seconds=5.0)
        await connection.close()

    asyncio.run(run())
    assert used[0] == used[1] != used[2]
