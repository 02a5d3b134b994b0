"""Weights as a serialised tensor in a request: through shared memory of the machine, or by value."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing

from megatron_klear.errors import WeightSyncError
from megatron_klear.records import EncodedJson
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineGroup
from megatron_klear.weight_sync.shared_file import SharedFile
from megatron_klear.weight_sync.shared_memory import no_room
from megatron_klear.weight_sync.transport import UpdateSession

UPDATE_PATH = "/update_weights_from_tensor"
_OPEN_SECONDS = 5.0
"""How long engines have after a failure to open what they were sent; a run that fails has little time to close."""


class TensorTransport:
    """One flat tensor per bucket, given to `update_weights_from_tensor`; implements `Transport`.

    Weights on a GPU go through the machine's memory; `SharedTransport` avoids that on GPUs that both sides use.

    Args:
        engines: who loads them.
        tp: their tensor parallel size; every rank is given every bucket and takes its share.
        by_value: whether the bytes stand in the request, for engines on another machine.
    """

    def __init__(self, engines: EngineGroup, *, tp: int, by_value: bool) -> None:
        self._engines, self._tp, self._by_value = engines, tp, by_value
        self._session = UpdateSession(engines)
        self._files: list[SharedFile] = []

    def begin(self, version: int) -> None:
        """Open an update session."""
        self.close()
        self._session.begin()

    def send(self, bucket: Bucket) -> None:
        """Send a bucket and let it load; waits for the one before."""
        flat = bucket.flat().cpu()
        value = contents(bucket, flat)
        if self._by_value:
            calls = self._engines.start(UPDATE_PATH, encoded_body(serialized_by_value(value), self._tp))
        else:
            # A text for each reader: torch counts them, and a file that those before have read is gone for the next.
            each = [[serialized(value) for _ in range(self._tp)] for _ in self._engines.callers]
            if each:
                self._files.append(SharedFile(flat))
            calls = self._engines.start(UPDATE_PATH, [update_body(texts) for texts in each])
        self._session.follow(calls)
        # All engines that are left have loaded the bucket before: every rank of theirs is done with the one before it.
        while len(self._files) > 2:
            self._files.pop(0).remove()

    def finish(self) -> None:
        """Wait for the last bucket and close the session."""
        self._session.end()
        self.close()

    def close(self) -> None:
        """Remove what is left of a set in shared memory; a second call does nothing."""
        try:
            # Where a set failed, the engines may have buckets to open still; one that finds no file ends.
            self._session.give_up(_OPEN_SECONDS)
        finally:
            for file in self._files:
                file.remove()
            self._files = []


def update_body(texts: Sequence[str]) -> dict[str, Any]:
    """Request that loads a bucket: one serialised tensor for each of an engine's ranks."""
    return {"serialized_named_tensors": list(texts), "load_format": "flattened_bucket", "flush_cache": False}


def encoded_body(text: bytes, tp: int) -> EncodedJson:
    """As `update_body` with the same text for each rank, encoded once for all engines."""
    before, after = json.dumps(update_body(["|"])).encode().split(b"|")
    more = [b'","', text] * (tp - 1)
    return EncodedJson(b"".join([before, text, *more, after]))  # base64 needs no escapes


def contents(bucket: Bucket, flat: torch.Tensor) -> dict[str, Any]:
    """A bucket as SGLang takes it: its bytes [num_bytes] uint8 in one tensor, and which are whose."""
    # SGLang reads attributes, and its unpickler refuses every class of our own.
    entries, start = [], 0
    for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
        size = tensor.numel() * tensor.element_size()
        entries.append(
            SimpleNamespace(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=start + size,
                numel=size,
            )
        )
        start += size
    return {"flattened_tensor": flat, "metadata": entries}


def serialized_by_value(value: dict[str, Any]) -> bytes:
    """Base64 of a pickle that SGLang accepts, with tensors as their bytes."""
    return base64.b64encode(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def serialized(value: dict[str, Any]) -> str:
    """Base64 of a pickle that SGLang accepts, with tensors as files of shared memory.

    Shared memory by descriptor, torch's default, would need a socket between the two processes.

    Raises:
        WeightSyncError: shared memory is full.
    """
    buffer = io.BytesIO()
    with _shared_by_name():
        try:
            ForkingPickler(buffer).dump(value)
        except RuntimeError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise WeightSyncError(no_room(value["flattened_tensor"].nbytes, str(error))) from error
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def _shared_by_name() -> Iterator[None]:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
