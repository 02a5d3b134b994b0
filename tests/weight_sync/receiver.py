"""Stands in for a server that gets weights: `receiver.py PORT [FAULT@PLACE ...]`, by broadcast over gloo or in files.

Like SGLang it answers requests in many threads and does what concerns weights in one, which waits in a broadcast for
torch's usual half an hour. Faults: `die`, `stop` (itself, by a signal), `refuse`, and a number of seconds to wait for;
places: `join`, a number of an update request (from 1, over all sets), or such a number and `mid`: when the first bytes
of the tensor are there, or its file is open.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
    default_pg_timeout,
)

from megatron_klear.weight_sync.hashes import engine_hash


class Receiver:
    """Groups and weights.

    Args:
        faults: fault by place.
    """

    def __init__(self, faults: dict[str, str]) -> None:
        self._faults = faults
        self._busy = threading.Lock()
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._updates = 0
        self._is_open = False
        self.seen: list[str] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.seen.append(path)
        if path == "/seen":
            return 200, self.seen
        with self._busy:
            try:
                made = getattr(self, path.strip("/"), lambda _: {})(body)
            except (RuntimeError, AssertionError, KeyError) as error:
                return 400, {"message": f"{type(error).__name__}: {error}"}
        return 200, made

    def init_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        self._fail_at("join")
        name, size = body["group_name"], body["world_size"]
        store = dist.TCPStore(body["master_address"], body["master_port"], size, is_master=False)
        group, _ = _new_process_group_helper(
            size, body["rank_offset"], [], Backend("gloo"), PrefixStore(name, store), group_name=GroupName(name),
            timeout=default_pg_timeout,
        )  # fmt: skip
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._groups[name] = group
        return {}

    def destroy_weights_update_group(self, body: dict[str, Any]) -> dict[str, Any]:
        dist.destroy_process_group(self._groups.pop(body["group_name"]))
        return {}

    def begin_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self._is_open
        self._is_open = True
        return {}

    def end_weight_update(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self._is_open
        self._is_open = False
        return {}

    def update_weights_from_distributed(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self._is_open
        self._updates += 1
        self._fail_at(str(self._updates))
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        shapes = [torch.Size(shape) for shape in body["shapes"]]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        flat = torch.zeros(sum(sizes), dtype=torch.uint8)
        if f"{self._updates}mid" in self._faults:
            threading.Thread(target=self._fail_in_the_middle, args=(flat, f"{self._updates}mid"), daemon=True).start()
        dist.broadcast(flat, src=0, group=self._groups[body["group_name"]])
        parts = zip(body["names"], torch.split(flat, sizes), dtypes, shapes, strict=True)
        self._weights |= {name: part.clone().view(dtype).reshape(shape) for name, part, dtype, shape in parts}
        return {}

    def update_weights_from_tensor(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self._is_open
        self._updates += 1
        self._fail_at(str(self._updates))
        # As SGLang: one that finds no file is not caught, and ends the server.
        try:
            sent = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        self._fail_at(f"{self._updates}mid")
        for entry in sent["metadata"]:
            part = sent["flattened_tensor"][entry.start_idx : entry.end_idx]
            self._weights[entry.name] = part.clone().view(entry.dtype).reshape(entry.shape)
        return {}

    def weights_checker(self, body: dict[str, Any]) -> dict[str, Any]:
        checksums = {name: engine_hash(tensor, "cpu") for name, tensor in self._weights.items()}
        return {"ranks": [{"checksums": checksums}]}

    def _fail_at(self, place: str) -> None:
        fault = self._faults.get(place)
        if fault == "refuse":
            raise RuntimeError("tired")
        if fault in ("die", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "die" else signal.SIGSTOP)
        elif fault is not None:
            time.sleep(float(fault))

    def _fail_in_the_middle(self, flat: torch.Tensor, place: str) -> None:
        while not flat[0]:
            time.sleep(0.0005)
        self._fail_at(place)


def handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, made = receiver.answer(self.path, body)
            text = json.dumps(made).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    told = dict(reversed(fault.split("@")) for fault in sys.argv[2:])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), handler(Receiver(told)))
    print(server.server_address[1], flush=True)
    server.serve_forever()
