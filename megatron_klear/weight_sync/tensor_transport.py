"""Weights as a serialised tensor in a request: through shared memory of the machine, or by value."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing

from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineGroup
from megatron_klear.weight_sync.transport import UpdateSession


class TensorTransport:
    """One flat tensor per bucket, given to `update_weights_from_tensor`; implements `Transport`.

    Weights on a GPU go through the machine's memory. Handles of GPU memory (CUDA IPC) for engines on the trainer's own
    GPUs are owed: they were not tried yet.

    Args:
        engines: who loads them.
        tp: their tensor parallel size; every rank is given every bucket and takes its share.
        by_value: whether the bytes stand in the request, for engines on another machine.
    """

    def __init__(self, engines: EngineGroup, *, tp: int, by_value: bool) -> None:
        self._engines, self._tp, self._by_value = engines, tp, by_value
        self._session = UpdateSession(engines)
        self._shared: list[torch.Tensor] = []

    def begin(self, version: int) -> None:
        """Open an update session."""
        self._shared = []
        self._session.begin()

    def send(self, bucket: Bucket) -> None:
        """Send a bucket and let it load; waits for the one before."""
        flat = bucket.flat().cpu()
        # SGLang reads attributes, and its unpickler refuses every class of our own.
        metadata = _metadata(bucket)
        text = serialized({"flattened_tensor": flat, "metadata": metadata}, by_value=self._by_value)
        body = {
            "serialized_named_tensors": [text] * self._tp,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        self._session.follow(self._engines.start("/update_weights_from_tensor", body))
        # Shared memory lives as long as a tensor of ours: until the bucket after this one has been sent.
        self._shared = [*self._shared[-1:], flat]

    def finish(self) -> None:
        """Wait for the last bucket and close the session."""
        self._session.end()
        self._shared = []

    def close(self) -> None:
        """Nothing is held."""


def _metadata(bucket: Bucket) -> list[SimpleNamespace]:
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
    return entries


def serialized(value: object, *, by_value: bool) -> str:
    """Base64 of a pickle that SGLang accepts: tensors as files of shared memory, or as their bytes.

    Shared memory by descriptor, torch's default, would need a socket between the two processes.
    """
    buffer = io.BytesIO()
    if by_value:
        pickle.Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    else:
        with _shared_by_name():
            ForkingPickler(buffer).dump(value)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def _shared_by_name() -> Iterator[None]:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
