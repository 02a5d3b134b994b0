"""A stand-in for a server, for faults that a real one does not have on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import GenerationRequest

VOCAB = 83

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Passes every request to the stand-in's answer for its path."""

    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: dict[str, Any]) -> None:
        self.stand_in.seen.append((self.path, body))
        answer = self.stand_in.answers.get(self.path)
        if answer is None:
            self.reply(404, {"detail": "Not Found"})
        elif callable(answer):
            answer(self, body)
        else:
            self.reply(200, answer)

    def reply(self, status: int, value: Any) -> None:
        """Answer with JSON, or with text as it is."""
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def events(self, *values: Any, done: bool = True, pause: float = 0.0) -> None:
        """Answer with a stream of events; without `done` the connection ends in its middle."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for value in [*values, *(["[DONE]"] if done else [])]:
            text = value if isinstance(value, str) else json.dumps(value)
            data = f"data: {text}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            time.sleep(pause)
        if done:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True
            self.connection.close()


@dataclass
class StandIn:
    """What it answers by path (a value, or a function of handler and body), and what it was asked."""

    url: str = ""
    answers: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """A server that answers as a good one does to everything but /generate."""
    with standing_in() as made:
        yield made


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Run a stand-in."""
    made = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stand_in": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    made.answers = {
        "/abort_request": {},
        "/model_info": {"architectures": ["Qwen3ForCausalLM"], "is_generation": True, "weight_version": "3"},
        "/server_info": {
            "version": "0.5.23",
            "device": "cpu",
            "tp_size": 1,
            "dtype": "float32",
            "quantization": None,
            "incremental_streaming_output": True,
            "skip_tokenizer_init": True,
        },
        "/v1/models": {"data": [{"max_model_len": 512}]},
        "/generate": lambda handler, body: handler.reply(
            400, {"error": {"message": f"logit_bias must has keys in [0, {VOCAB - 1}], got 1000000000."}}
        ),
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def chunk(ids: list[int], total: int, *, finish: Any = None, **meta: Any) -> dict[str, Any]:
    """A chunk of an incremental stream, as SGLang 0.5.23 sends it."""
    info: dict[str, Any] = {
        "finish_reason": finish,
        "completion_tokens": total,
        "weight_version": "3",
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
    }
    if finish is not None:
        info["weight_versions"] = [{"version": "3", "start": 0, "end": total}]
    return {"output_ids": ids, "meta_info": info | meta}


@pytest.fixture
def make_request() -> Callable[..., GenerationRequest]:
    """A request of three tokens."""

    def make(ids: Any = (1, 2, 3), *, max_new_tokens: int = 8, stops: tuple[int, ...] = ()) -> GenerationRequest:
        sampling = SamplingParams(temperature=0.7, top_p=0.9, max_response_tokens=8, stop_token_ids=stops)
        return GenerationRequest(
            request_id="r1", token_ids=np.array(ids, np.int64), max_new_tokens=max_new_tokens, sampling=sampling, seed=5
        )

    return make
