"""Weights by broadcast in a process group of the first rank and all ranks of all engines."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import time
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, GroupName, PrefixStore, _new_process_group_helper, _world

from megatron_klear.errors import KlearError, WeightSyncError
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineGroup, PendingCalls
from megatron_klear.weight_sync.transport import UpdateSession, dtype_name

_JOIN_SECONDS = 300.0
_POLL_SECONDS = (0.0005, 0.05)
_numbers = itertools.count()


class DistributedTransport:
    """One broadcast per bucket, over gloo or NCCL; implements `Transport`.

    The group is made for the first set and kept; after a failure, or when engines have come or gone, it is made anew.
    An engine that ends in the middle of a broadcast ends the publish: the others hold part of the new weights.

    Args:
        engines: who receives them.
        tp: their tensor parallel size.
        device: of the buckets; NCCL on a GPU, gloo on a CPU.
        keep_group: false makes the group anew for every set: a server of others may be another process since, at the
            same address, that was never in it.
    """

    def __init__(self, engines: EngineGroup, *, tp: int, device: torch.device, keep_group: bool = True) -> None:
        self._keep_group = keep_group
        self._engines, self._tp, self._device = engines, tp, device
        self._session = UpdateSession(engines)
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        self._members = engines.callers

    def begin(self, version: int) -> None:
        """Join the engines in a group, if that was not done, and open an update session."""
        if self._members != self._engines.callers:
            self.close()
        if self._group is None and self._engines.callers:
            self._join()
        self._session.begin()

    def send(self, bucket: Bucket) -> None:
        """Broadcast a bucket and let it load."""
        # An engine that still loads the bucket before does not take part in the next broadcast yet.
        self._session.wait()
        if not self._engines.callers:
            return
        body = {
            "names": list(bucket.names),
            "dtypes": [dtype_name(tensor.dtype) for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        calls = self._engines.start("/update_weights_from_distributed", body)
        flat = bucket.flat().to(self._device)
        try:
            self._broadcast(flat, calls)
        except RuntimeError as error:
            self._leave()
            text = "; ".join(calls.failures()) or str(error).splitlines()[0]
            raise WeightSyncError(f"broadcasting weights to the engines failed: {text}") from error
        self._session.follow(calls)

    def _broadcast(self, flat: torch.Tensor, calls: PendingCalls) -> None:
        """Broadcast, but do not wait for an engine that has refused to take part."""
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        assert work is not None
        pause = _POLL_SECONDS[0]
        while not work.is_completed():
            if calls.failures():
                raise RuntimeError("an engine refused")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
        work.wait()

    def finish(self) -> None:
        """Wait for the last bucket and close the session."""
        self._session.end()
        if not self._keep_group:
            self.close()

    def close(self) -> None:
        """Leave the group; a second call does nothing."""
        if self._group is None:
            return
        with contextlib.suppress(KlearError):
            self._engines.call("/destroy_weights_update_group", {"group_name": self._group_name})
        self._leave()

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)

    def _join(self) -> None:
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        address, size = address_for(self._engines), 1 + self._tp * len(self._engines.callers)
        seconds = min(self._engines.timeout_seconds, _JOIN_SECONDS)
        self._group_name = f"klear_weights_{os.getpid()}_{next(_numbers)}"
        # The store takes a free port itself, so that no other process can take it in between; the second handle joins
        # the store of the first, and waits for the engines as each of them does.
        self._port_holder = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        shared = {
            "master_address": address,
            "master_port": self._port_holder.port,
            "world_size": size,
            "group_name": self._group_name,
            "backend": backend,
        }
        self._members = self._engines.callers
        bodies = [shared | {"rank_offset": 1 + i * self._tp} for i in range(len(self._engines.callers))]
        calls = self._engines.start("/init_weights_update_group", bodies)
        try:
            store = dist.TCPStore(
                address, self._port_holder.port, size, is_master=True, multi_tenant=True,
                timeout=datetime.timedelta(seconds=seconds),
            )  # fmt: skip
            group, _ = _new_process_group_helper(
                size, 0, [], Backend(backend), PrefixStore(self._group_name, store),
                group_name=GroupName(self._group_name),
                timeout=datetime.timedelta(seconds=self._engines.timeout_seconds),
            )  # fmt: skip
        except RuntimeError as error:
            text = "; ".join(calls.failures()) or str(error).splitlines()[0]
            raise WeightSyncError(f"the engines did not join the group for weights: {text}") from error
        assert isinstance(group, dist.ProcessGroup)
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._group = group
        calls.answers()


def address_for(engines: EngineGroup) -> str:
    """This machine's address as the engines see it: the one it reaches them from, those elsewhere if there are any."""
    # Engines on this machine may be known by 127.0.0.1, where those of other machines would look for themselves.
    elsewhere = [c for c in engines.callers if not _is_loopback(urlsplit(c.url).hostname)]
    chosen = [*elsewhere, *engines.callers][0]
    parts = urlsplit(chosen.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        except OSError as error:
            raise WeightSyncError(f"{chosen.name}: no way to its address: {error}") from error
        return str(probe.getsockname()[0])


def _is_loopback(host: str | None) -> bool:
    return host is None or host in ("localhost", "::1") or host.startswith("127.")
