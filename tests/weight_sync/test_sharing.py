"""What a rank offers of a GPU's memory, as far as that shows without one; the exchange is in test_publish."""

from __future__ import annotations

import base64
import io
import multiprocessing
import pickle
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from megatron_klear.errors import WeightSyncError
from megatron_klear.weight_sync import sharing
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.tensor_transport import contents

UUID = "0e1d2c3b-aaaa-bbbb-cccc-001122334455"
ACCEPTED = {
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.storage", "TypedStorage"),
    ("torch", "Tensor"),
    ("torch", "Size"),
    ("torch", "uint8"),
    ("torch", "bfloat16"),
    ("types", "SimpleNamespace"),
}
"""Globals among those that SGLang 0.5.23 lets a tensor's pickle name."""


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", 3))  # type: ignore[assignment]


def reduced(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What torch's own reduction of a CUDA tensor gives: place 6 is the device's number in this process."""
    handle = (
        torch.storage.TypedStorage,
        tensor.dtype,
        3,
        b"handle",
        tensor.numel(),
        512,
        False,
        b"ref",
        0,
        b"ev",
        True,
    )
    return reductions.rebuild_cuda_tensor, (torch.Tensor, tensor.size(), tensor.stride(), 0, *handle)


class Reader(pickle.Unpickler):
    """Notes which globals a pickle names, and rebuilds handles as their arguments."""

    def __init__(self, text: str) -> None:
        super().__init__(io.BytesIO(base64.b64decode(text)))
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add((module, name))
        return (lambda *given: given) if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def test_a_handle_names_the_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "reduce_tensor", reduced)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"{UUID}" if n == 3 else n))
    bucket = Bucket(names=("a", "b"), tensors=(torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16)))
    value = contents(bucket, bucket.flat().as_subclass(OnGpu))
    reader = Reader(sharing.serialized_here(value))
    found = reader.load()
    kind, shape, stride, offset, *handle = found["flattened_tensor"]
    assert (kind, tuple(shape), tuple(stride), offset) == (torch.Tensor, (32,), (1,), 0)
    assert handle[2] == UUID
    assert handle[3] == b"handle"
    assert [(m.name, m.start_idx, m.end_idx, m.dtype) for m in found["metadata"]] == [
        ("a", 0, 24, torch.float32), ("b", 24, 32, torch.bfloat16),
    ]  # fmt: skip
    assert reader.named - {("torch", "float32")} == ACCEPTED


def offering_rank(rank: int, port: int, results: Any) -> None:
    """One of two ranks; the second has no memory for its first bucket."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, size=2), device=torch.device("cpu"))
    offering = sharing.BucketSharing(context)
    good = Bucket(names=("a",), tensors=(torch.full((3,), float(rank)),))
    bad: Any = SimpleNamespace(flat=lambda: (_ for _ in ()).throw(MemoryError("8 GB")))
    try:
        offering.offer(bad if rank == 1 else good)
        outcome: Any = "offered"
    except WeightSyncError as error:
        outcome = str(error)
    offering.offer(good)
    results.put((rank, outcome, len(offering.offers), len(set(offering.offers))))
    dist.barrier()


def test_a_rank_that_cannot_offer_is_named_on_every_rank() -> None:
    """And no rank is left behind in the exchange: the next bucket's offers are whole."""
    spawning = multiprocessing.get_context("spawn")
    results = spawning.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [spawning.Process(target=offering_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    text = "no copy of the weights can be offered to the engines: rank 1: MemoryError: 8 GB"
    assert found == [(0, text, 2, 2), (1, text, 2, 2)]
