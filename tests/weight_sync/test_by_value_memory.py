"""Weights by value are encoded once, however many engines get them."""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from megatron_klear.rollout.sglang import Connection
from megatron_klear.rollout.sglang.loop import LoopThread
from megatron_klear.rollout.sglang.serving import SglangCaller
from megatron_klear.weight_sync import EngineGroup, TensorTransport
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import PendingCalls
from megatron_klear.weight_sync.tensor_transport import UPDATE_PATH

BUCKET = 12 * 2**20
BODY = BUCKET * 4 // 3
BUCKETS = 4


class Group(EngineGroup):
    """Lets engines read a bucket only when the one after it is under way, too, as slow ones do."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.may_be_read = [threading.Event() for _ in range(BUCKETS)]
        self.started = 0

    def start(self, path: str, *arguments: Any, **options: Any) -> PendingCalls:
        calls = super().start(path, *arguments, **options)
        if path == UPDATE_PATH:
            self.started += 1
            self.may_be_read[self.started - 2].set() if self.started > 1 else None
        return calls


@contextmanager
def discarding(groups: list[Group]) -> Iterator[str]:
    """A server that keeps nothing of what it is sent."""
    numbers = itertools.count()

    class Discarding(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if self.path == UPDATE_PATH:
                assert groups[0].may_be_read[next(numbers)].wait(60)
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(self.rfile.read(min(left, 2**16)))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Discarding)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def peak_of_a_set(engines: int, tp: int) -> int:
    """Most bytes that Python held while a set was sent."""
    groups: list[Group] = []
    loop = LoopThread("test")
    with ExitStack() as stack:
        stack.callback(loop.close)
        urls = [stack.enter_context(discarding(groups)) for _ in range(engines)]
        group = Group([SglangCaller(loop, Connection(url, url)) for url in urls], 60.0)
        groups.append(group)
        transport = TensorTransport(group, tp=tp, by_value=True)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        transport.begin(1)
        for number in range(BUCKETS):
            transport.send(Bucket(names=("w",), tensors=(torch.full((BUCKET,), number, dtype=torch.uint8),)))
        group.may_be_read[-1].set()
        transport.finish()
        return tracemalloc.get_traced_memory()[1]


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_does_not_grow_with_the_number_of_engines(tp: int) -> None:
    one, five = peak_of_a_set(1, tp), peak_of_a_set(5, tp)
    assert five < one + BODY / 2
    # As `weight_sync.bucket_bytes` says; the buckets themselves are torch's.
    assert five < 2 * BODY * tp + BUCKET * 5 / 3 + BODY / 2
