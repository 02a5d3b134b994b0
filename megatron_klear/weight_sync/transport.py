"""How buckets of weights travel to the engines: the interface of the three transports, and by files."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Protocol

import torch

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineGroup, PendingCalls, Refusal
from megatron_klear.weight_sync.weight_files import WeightFiles

log = logging.getLogger(__name__)


class SetBrokenOff(WeightSyncError):
    """Engines were lost in the middle of a set, and those that are left hold a part of it: it must be sent again."""


class Transport(Protocol):
    """Brings one set of weights to all engines; used on the first rank only.

    `send` and `finish` may raise `SetBrokenOff`; the set then begins anew, from `begin` on.
    """

    def begin(self, version: int) -> None:
        """Start a set.

        Raises:
            WeightSyncError: an engine refuses; so do all methods.
        """
        ...

    def send(self, bucket: Bucket) -> None:
        """Send a bucket; may return while the engines still load it."""
        ...

    def finish(self) -> None:
        """Wait until the engines have all buckets."""
        ...

    def close(self) -> None:
        """Release what was held over several sets; a second call does nothing."""
        ...


class UpdateSession:
    """SGLang's frame around tensor and distributed updates; servers that know none (status 404) need none.

    A server keeps a frame that was not closed, whoever opened it: a set that broke off, or a trainer that was killed.
    """

    def __init__(self, engines: EngineGroup) -> None:
        self._engines = engines
        self._under_way: list[PendingCalls] = []
        self._open = False

    def begin(self) -> None:
        """Open the frame."""
        self._under_way = []
        if self._open:  # an earlier set broke off
            self._close_what_is_open()
        try:
            self._open = self._opened()
        except Refusal as refusal:
            log.info("%s; closing what an earlier set may have left open", refusal)
            self._close_what_is_open()
            self._open = self._opened()

    def _opened(self) -> bool:
        return self._engines.try_call("/begin_weight_update", {"selector": "all"}) is not None

    def _close_what_is_open(self) -> None:
        self._open = False
        # Refused by those that have nothing open.
        with contextlib.suppress(Refusal):
            self._engines.try_call("/end_weight_update", {})

    def follow(self, calls: PendingCalls) -> None:
        """Let a bucket's calls run on, after those of the bucket before have ended: two are under way at most."""
        self._under_way.append(calls)
        self._wait_for_all_but(1)

    def wait(self) -> None:
        """Wait for the bucket that is under way."""
        self._wait_for_all_but(0)

    def give_up(self, seconds: float) -> None:
        """Let the calls that are under way end, whatever comes of them, but wait so long at most."""
        under_way, self._under_way = self._under_way, []
        deadline = time.monotonic() + seconds
        for calls in under_way:
            calls.wait(deadline - time.monotonic())

    def _wait_for_all_but(self, number: int) -> None:
        while len(self._under_way) > number:
            self._under_way[0].answers()
            del self._under_way[0]

    def end(self) -> None:
        """Wait for the last bucket and close the frame."""
        self.wait()
        if self._open:
            self._open = False
            self._engines.call("/end_weight_update", {})


class DiskTransport:
    """Safetensors files in a directory that the engines can read, one file per bucket; implements `Transport`.

    Args:
        engines: who loads them.
        files: where they are written; those that it keeps are there for engines that restart.
    """

    def __init__(self, engines: EngineGroup, files: WeightFiles) -> None:
        self._engines, self._files = engines, files

    def begin(self, version: int) -> None:
        """Make an empty directory for the version."""
        self._files.begin(version)

    def send(self, bucket: Bucket) -> None:
        """Write a bucket's file."""
        self._files.write(bucket)

    def finish(self) -> None:
        """Complete the directory and have the engines load it."""
        load_from_disk(self._engines, self._files.complete())
        self._files.remove_old()

    def close(self) -> None:
        """Nothing is held; the files stay, for engines that restart."""


class KeepingTransport:
    """Another transport, and beside it a copy of the newest set in files; implements `Transport`.

    Args:
        transport: brings the weights to the engines.
        files: get the copy, for engines that restart while the trainer trains.
    """

    def __init__(self, transport: Transport, files: WeightFiles) -> None:
        self._transport, self._files = transport, files

    def begin(self, version: int) -> None:
        """Start a set in both."""
        self._files.begin(version)
        self._transport.begin(version)

    def send(self, bucket: Bucket) -> None:
        """Send a bucket, and write it while the engines load it."""
        self._transport.send(bucket)
        self._files.write(bucket)

    def finish(self) -> None:
        """Wait for the engines, and put the copy in the place of the one before."""
        self._transport.finish()
        self._files.complete()
        self._files.remove_old()

    def close(self) -> None:
        """Release what the other transport holds; the files stay."""
        self._transport.close()


def load_from_disk(engines: EngineGroup, directory: Path) -> None:
    """Have all engines load the weights in a directory.

    Raises:
        WeightSyncError: one of them refuses.
    """
    body = {"model_path": str(directory), "load_format": "safetensors", "flush_cache": False}
    engines.call("/update_weights_from_disk", body)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
