"""How a publish brings weights to engines, and what bytes it moves: by the transport that a run would choose.

The choice is that of `session/transports.py`: `weight_sync.transport`, and for `auto` whether all servers are on the
first rank's machine. A broadcast sends the model once, whatever the number of engines; through the host's memory it is
copied out once and into each engine; an engine on the trainer's own GPUs copies its share inside of them. What the
trainer's ranks send one another to put whole tensors together is not counted, nor is the time of checksums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from megatron_klear.config import Entry, Settings
from megatron_klear.planning.devices import Device
from megatron_klear.planning.memory import is_colocated, whole_model_bytes

HOST_RATE = 20e9
"""Bytes per second of all copies through a host's pageable memory together: a guess, under PCIe 5.0's 64 GB/s."""

FILE_RATE = 2e9
"""Bytes per second into and out of files of `run.dir`: a guess for a file system that machines share."""

_BASE64 = 4 / 3

Way = Literal["broadcast", "node broadcast", "requests", "host", "same device", "files"]

_IN_WORDS: dict[Way, str] = {
    "broadcast": "in one broadcast over the network, as many bytes for any number of engines (distributed)",
    "node broadcast": "in one broadcast inside the node, as many bytes for any number of engines (distributed)",
    "requests": "in HTTP requests, base64, to each GPU of each engine (tensor, on another machine)",
    "host": "through the host's memory, out once and into each engine (tensor, on one machine)",
    "same device": "by copies inside the GPUs that trainer and engines share (tensor, CUDA IPC)",
    "files": "by files that every engine reads (disk)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publishing:
    """One set of weights on its way.

    Attributes:
        way: how it goes.
        engines: servers that it goes to; with `broadcast` it makes no difference.
        moved: bytes, of all copies together where they share a path, of one GPU where each has its own.
        file_bytes: written to files, and with `files` read by every engine.
    """

    way: Way
    engines: int
    moved: float
    file_bytes: float

    @property
    def sent(self) -> float:
        """Bytes that leave the sending rank over the network or the node's links."""
        return self.moved if self.way in ("broadcast", "node broadcast", "requests") else 0.0

    def rate(self, device: Device, link_efficiency: float) -> float:
        """Bytes per second of what is moved."""
        network = device.network_rate * link_efficiency
        return {
            "broadcast": network,
            "node broadcast": device.link_rate * link_efficiency,
            "requests": min(network, HOST_RATE),
            "host": HOST_RATE,
            "same device": device.memory_rate * link_efficiency / 2,  # read and written
            "files": FILE_RATE,
        }[self.way]

    def seconds(self, device: Device, link_efficiency: float) -> float:
        """Of one publish; a bucket is written while engines load it, so that the slower of both counts."""
        return max(self.moved / self.rate(device, link_efficiency), self.file_bytes / FILE_RATE)

    def told(self, device: Device, link_efficiency: float) -> str:
        """It in words."""
        engines = "1 engine" if self.engines == 1 else f"{self.engines:,} engines"
        fleet = "engines" if self.way in ("broadcast", "node broadcast") else engines
        text = f"weights are published to {fleet} {_IN_WORDS[self.way]}"
        if self.moved:
            guess = ", a guess" if self.way in ("requests", "host") else ""
            rate = self.rate(device, link_efficiency)
            text += f": {self.moved / 1e9:,.1f} GB at {rate / 1e9:,.0f} GB/s{guess}"
        if self.file_bytes:
            kept = (
                "files take" if self.way == "files" else "and meanwhile written to run.dir (weight_sync.keep_on_disk)"
            )
            text += f"; {kept}: {self.file_bytes / 1e9:,.1f} GB at {FILE_RATE / 1e9:,.0f} GB/s, a guess"
        return text


def publishing(settings: Settings, entry: Entry, *, machines: int) -> Publishing | None:
    """How weights would be published; None where there are no servers.

    Args:
        settings: settings that fit together.
        entry: `sft` or `rl`.
        machines: of the trainer, on each of which `sglang.servers` are started if `sglang.urls` names none.
    """
    if not settings.generates(entry) or settings.rollout.engine != "sglang":
        return None
    sync, sglang, model = settings.weight_sync, settings.sglang, float(whole_model_bytes(settings))
    engines = len(sglang.urls) or sglang.servers * machines
    near = all(_is_loopback(url) for url in sglang.urls) if sglang.urls else machines == 1
    kind = sync.transport
    if kind == "auto":
        kind = "tensor" if near or is_colocated(settings) else "distributed"
    way: Way
    if kind == "disk":
        return Publishing(way="files", engines=engines, moved=0.0, file_bytes=model * (1 + engines))
    if is_colocated(settings):
        way, moved = "same device", model / sglang.server_tp
    elif kind == "distributed":
        way, moved = ("node broadcast" if near else "broadcast"), model
    elif near:
        way, moved = "host", model * (1 + engines)
    else:
        way, moved = "requests", model * _BASE64 * engines * sglang.server_tp
    keeps = sync.keep_on_disk and sglang.router_url is None
    return Publishing(way=way, engines=engines, moved=moved, file_bytes=model if keeps else 0.0)


def _is_loopback(url: str) -> bool:
    return (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
