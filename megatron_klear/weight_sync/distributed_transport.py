"""Weights by broadcast in a process group of the first rank and all ranks of all engines."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from urllib.parse import urlsplit

import torch

from megatron_klear.config import ENGINE_FREE_SECONDS
from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.broadcast_group import BroadcastGroup
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineCaller, EngineGroup, PendingCalls
from megatron_klear.weight_sync.transport import SetBrokenOff, UpdateSession, dtype_name

_JOIN_SECONDS = 300.0
_POLL_SECONDS = 0.05
_JOINING = "joining the engines in a group for weights"
_SENDING = "broadcasting weights to the engines"
_numbers = itertools.count()


class DistributedTransport:
    """One broadcast per bucket, over gloo or NCCL; implements `Transport`.

    The group is made for the first set and kept; after a failure, or when engines have come or gone, it is made anew.
    An engine that ends or hangs in the middle of a set breaks the group. It is left out, and so is one that does not
    get free of the broken group; to the others the set is to be sent again (`SetBrokenOff`). One hangs that has not
    taken a bucket after the `timeout_seconds` of the engines.

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
        self._free_seconds = min(engines.timeout_seconds, ENGINE_FREE_SECONDS)
        self._group: BroadcastGroup | None = None
        self._members = engines.callers
        self._loading: PendingCalls | None = None

    def begin(self, version: int) -> None:
        """Join the engines in a group, if that was not done, and open an update session."""
        self._loading = None
        while True:
            if self._members != self._engines.callers:
                self.close()
                self._members = self._engines.callers
            if self._group is None and self._engines.callers:
                self._join()
            if self._members == self._engines.callers:
                self._session.begin()
            if self._members == self._engines.callers:  # none was lost meanwhile
                return

    def send(self, bucket: Bucket) -> None:
        """Broadcast a bucket and let it load."""
        # An engine that still loads the bucket before does not take part in the next broadcast yet.
        self._settle_bucket()
        if self._members != self._engines.callers:
            self._break_off([])
        if self._group is None:
            return  # no engine is left
        body = {
            "names": list(bucket.names),
            "dtypes": [dtype_name(tensor.dtype) for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        # The broadcast is given up first: an engine that only waited for another one then has time to say so.
        limit = self._engines.timeout_seconds
        flat = bucket.flat().to(self._device)
        calls = self._engines.start("/update_weights_from_distributed", body, seconds=limit + self._free_seconds)
        start = time.monotonic()
        try:
            self._await(self._group.broadcast(flat), calls, limit)
        except (RuntimeError, TimeoutError) as error:
            late = calls.unanswered() if time.monotonic() - start >= limit else ()
            self._give_up(calls, str(error).splitlines()[0], late)
        else:
            self._loading = calls

    def finish(self) -> None:
        """Wait for the last bucket and close the session."""
        self._settle_bucket()  # without those that are lost from now on: the others have taken every bucket
        self._session.end()
        if not self._keep_group:
            self.close()

    def close(self) -> None:
        """Leave the group; a second call does nothing."""
        group, self._group = self._group, None
        if group is not None:
            calls = self._ask_to_leave(group)
            group.leave()
            calls.wait(self._free_seconds)

    def _settle_bucket(self) -> None:
        """Wait until the engines have loaded the bucket before; those that give no answer are left out."""
        calls, self._loading = self._loading, None
        if calls is None:
            return
        refused = calls.settle(self._free_seconds, what=_SENDING)
        if refused:
            self._break_off(refused)

    def _await(self, future: Future[None], calls: PendingCalls, seconds: float) -> None:
        """Wait for what needs all members, but not for an engine that has refused to take part, or has gone.

        Raises:
            RuntimeError: it failed, or an engine did.
            TimeoutError: it takes longer.
        """
        deadline = time.monotonic() + seconds
        while not concurrent.futures.wait([future], timeout=_POLL_SECONDS).done:
            self._engines.waiting()
            if failures := calls.failures():
                raise RuntimeError("; ".join(failures))
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took longer than {seconds:.0f} s (weight_sync.timeout_seconds)")
        future.result()

    def _give_up(self, calls: PendingCalls, why: str, late: Sequence[EngineCaller]) -> None:
        """After a broadcast that failed: find out who is lost.

        Args:
            calls: of the bucket.
            why: it failed.
            late: engines that had not taken the bucket in time.
        """
        group = self._abandon()
        refused = calls.settle(self._free_seconds, what=_SENDING, has_failed=True)
        if self._members == self._engines.callers:
            # All live, and some were freed by our end of the group only. They are as slow as if they gave no answer.
            for caller in late:
                if not self._engines.goes_on_without(caller, f"{caller.name}: {why}"):
                    break
        self._break_off(refused or [why], group)

    def _break_off(self, problems: Sequence[str], group: BroadcastGroup | None = None) -> None:
        """Free the engines that are left, and have the set sent to them again.

        Args:
            problems: what is known of the failure.
            group: that was left already; this one leaves the present one otherwise.

        Raises:
            SetBrokenOff: some are left.
            WeightSyncError: none was lost: sent again, it would fail again.
        """
        group = group or self._abandon()
        if self._members == self._engines.callers:
            raise WeightSyncError(f"{_SENDING} failed: {'; '.join(problems)}")
        if group is not None:
            # One that gives no answer hangs in the group, and is left out; one that refuses is not in it.
            self._ask_to_leave(group).settle(self._free_seconds, what=_SENDING, has_failed=True)
        if self._engines.callers:
            names = ", ".join(caller.name for caller in self._engines.callers)
            raise SetBrokenOff(f"{_SENDING} broke off; all of them are sent again to {names}")

    def _abandon(self) -> BroadcastGroup | None:
        group, self._group = self._group, None
        if group is not None:
            group.abandon()
        return group

    def _ask_to_leave(self, group: BroadcastGroup) -> PendingCalls:
        return self._engines.start("/destroy_weights_update_group", {"group_name": group.name})

    def _join(self) -> None:
        """Make a group with all engines; when some give no answer they are left out, and the group is of no use."""
        self._members = self._engines.callers
        seconds = min(self._engines.timeout_seconds, _JOIN_SECONDS)
        group = BroadcastGroup(
            f"klear_weights_{os.getpid()}_{next(_numbers)}",
            address=address_for(self._engines),
            size=1 + self._tp * len(self._members),
            device=self._device,
            join_seconds=seconds,
            broadcast_seconds=self._engines.timeout_seconds + self._free_seconds,  # ours is the limit that is told
        )
        bodies = [group.invitation | {"rank_offset": 1 + i * self._tp} for i in range(len(self._members))]
        calls = self._engines.start("/init_weights_update_group", bodies, seconds=seconds + self._free_seconds)
        self._group = group
        try:
            self._await(group.join(), calls, seconds)
        except (RuntimeError, TimeoutError) as error:
            self._abandon()
            refused = calls.settle(self._free_seconds, what=_JOINING, has_failed=True)
            problems = refused or [str(error).splitlines()[0]]
        else:
            problems = calls.settle(self._free_seconds, what=_JOINING)
        if problems and self._members == self._engines.callers:
            raise WeightSyncError(f"{_JOINING} failed: {'; '.join(problems)}")


def address_for(engines: EngineGroup) -> str:
    """This machine's address as the engines see it: the one it reaches them from, those elsewhere if there are any."""
    # Engines on this machine may be known by 127.0.0.1, where those of other machines would look for themselves.
    elsewhere = [c for c in engines.callers if not _is_loopback(urlsplit(c.url).hostname)]
    chosen = [*elsewhere, *engines.callers][0]
    parts = urlsplit(chosen.url)
    host = parts.hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, parts.port or 80))  # sends nothing
        except OSError as error:
            raise WeightSyncError(f"{chosen.name}: no way to its address: {error}") from error
        return str(probe.getsockname()[0])


def _is_loopback(host: str | None) -> bool:
    return host is None or host in ("localhost", "::1") or host.startswith("127.")
