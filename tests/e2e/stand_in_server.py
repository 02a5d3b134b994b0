"""Answers as an SGLang server does, at once, with tokens that depend on prompt and seed alone; has faults on demand.

stand_in_server.py --port PORT --context-length LENGTH ...

The directory named by STAND_IN_FAULTS counts over all servers how often memory for weights was given up; a file in it
named `N.die` has the server end after the N-th answer, `N.hang` has it never give that answer, and `N.drop` has it
break the connection when it is told to generate again after that. So it counts the responses that are asked for, and a
file named `N.end` has the server end that is asked for the N-th, and `N.leave` that has it end with its N-th answer,
`N.pause` when it is told to pause for the N-th time. `N.mute` has the server that is asked for the N-th response bring
no token of this one and of any later one, and be well otherwise. `N.late` has the N-th server that starts take minutes.
STAND_IN_SECONDS is how long a response takes.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = Path(os.environ["STAND_IN_FAULTS"])
VOCAB = 164
_SHARED_BY = re.compile(rb"torch_(\d+)_")


class State:
    version = "default"
    gone: set[str] = set()  # noqa: RUF012  (one server, one state)
    drops = mute = False
    sent, pauses = itertools.count(1), itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def answer(self, body: dict[str, Any]) -> None:
        print("POST", self.path, *body.get("tags", ()), flush=True)
        for offer in body.get("serialized_named_tensors", ()):
            # Shared memory is named after the process that offers it.
            print("OFFER", *sorted({int(pid) for pid in _SHARED_BY.findall(base64.b64decode(offer))}), flush=True)
        if self.path == "/continue_generation" and State.drops:
            print("DROPPED", flush=True)
            self.close_connection, State.drops = True, False
            return None
        if self.path == "/generate" and body.get("stream"):
            print("TOKENS", flush=True)
            count_response()
            self.reply(200, b"data: " + json.dumps(generated(body)).encode() + b"\n\ndata: [DONE]\n\n")
            end_if_told(next(State.sent), "leave")
            return None
        if self.path == "/pause_generation":
            end_if_told(next(State.pauses), "pause")
        status, value = 200, known(self.path, body)
        if self.path == "/generate":
            status, value = 400, {"error": {"message": f"logit_bias must has keys in [0, {VOCAB - 1}], got more"}}
        self.reply(status, json.dumps(value).encode())
        return None

    def reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def known(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/update_weight_version":
        State.version = body["new_version"]
    if path == "/release_memory_occupation":
        release(body["tags"])
    if path == "/resume_memory_occupation":
        if not State.gone.issuperset(body["tags"]):
            os._exit(3)  # as SGLang ends
        State.gone -= set(body["tags"])
    return {
        "/model_info": {
            "architectures": ["Qwen3ForCausalLM"], "is_generation": True, "weight_version": State.version,
        },
        "/server_info": {
            "version": "0.5.23", "device": "cpu", "tp_size": 1, "dtype": "float32", "quantization": None,
            "incremental_streaming_output": True, "skip_tokenizer_init": True,
        },
        "/v1/models": {
            "data": [
                {
                    "id": sys.argv[sys.argv.index("--served-model-name") + 1],
                    "max_model_len": int(sys.argv[sys.argv.index("--context-length") + 1]),
                }
            ]
        },
    }.get(path, {})  # fmt: skip


def release(tags: list[str]) -> None:
    State.gone |= set(tags)
    if tags != ["weights"]:
        return
    number = len(list(FAULTS.glob("*.seen"))) + 1
    (FAULTS / f"{number}.seen").touch()
    if (FAULTS / f"{number}.hang").exists():
        time.sleep(600)
    State.drops = (FAULTS / f"{number}.drop").exists()
    if (FAULTS / f"{number}.die").exists():
        threading.Timer(0.02, os._exit, [9]).start()


def counted(what: str) -> int:
    """How often this has been, over all servers, this time included."""
    number = 1
    while True:
        try:
            (FAULTS / f"{number}.{what}").touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return number


def count_response() -> None:
    """Of all servers; ends or mutes this one where it is told to at that number."""
    number = counted("asked")
    if (FAULTS / f"{number}.end").exists():
        os._exit(9)
    State.mute |= (FAULTS / f"{number}.mute").exists()
    while State.mute:
        time.sleep(1)


def end_if_told(number: int, fault: str) -> None:
    if (FAULTS / f"{number}.{fault}").exists():
        os._exit(9)


def generated(body: dict[str, Any]) -> dict[str, Any]:
    if State.gone:
        os._exit(4)  # there is no memory to generate with
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    sampling = body["sampling_params"]
    rng = random.Random(f"{body['input_ids']} {sampling['sampling_seed']}")
    count = min(sampling["max_new_tokens"], rng.randint(3, 30))
    ids = [rng.choice([t for t in range(VOCAB) if t not in sampling["stop_token_ids"]]) for _ in range(count)]
    stops = count < sampling["max_new_tokens"]
    if stops:
        ids[-1] = sampling["stop_token_ids"][0]
    meta = {
        "finish_reason": {"type": "stop", "matched": ids[-1]} if stops else {"type": "length", "length": count},
        "completion_tokens": count,
        "output_token_logprobs": [[-5.0, token, None] for token in ids],
        "weight_versions": [{"version": State.version, "start": 0, "end": count}],
    }
    return {"output_ids": ids, "meta_info": meta}


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


if __name__ == "__main__":
    if (FAULTS / f"{counted('started')}.late").exists():
        time.sleep(300)
    Server(
        (sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])), Handler
    ).serve_forever()
