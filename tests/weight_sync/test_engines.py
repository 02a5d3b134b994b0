"""Engines that come and go while they are called."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from typing import Any

from megatron_klear.weight_sync import EngineGroup


class Engine:
    """Answers its name, and has something done while it is being asked."""

    url = "http://127.0.0.1:1"

    def __init__(self, name: str) -> None:
        self.name = name
        self.meanwhile = lambda: None

    def start(self, path: str, body: Mapping[str, Any], *, timeout_seconds: float) -> Any:
        self.meanwhile()
        future: concurrent.futures.Future[tuple[int, str]] = concurrent.futures.Future()
        future.set_result((200, f'"{self.name}"'))
        return future


def test_an_engine_that_is_taken_out_while_all_are_asked_is_no_error() -> None:
    """A restart's thread takes it out, and the trainer's turn begins with a call to all."""
    engines = [Engine("a"), Engine("b"), Engine("c")]
    group = EngineGroup(engines, 5.0)
    engines[0].meanwhile = lambda: group.leave(engines[1])
    assert group.call("/pause_generation", {"mode": "abort"}) == ["a", "c"]
    fresh = Engine("d")
    engines[0].meanwhile = lambda: group.take_in(fresh)
    pending = group.start("/flush_cache", {})
    assert group.callers == (engines[0], engines[2], fresh)
    assert pending.failures() == []
    assert pending.unanswered() == ()
    assert pending.settle(1.0, what="asking") == []
