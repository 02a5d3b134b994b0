"""What a rank offers of a GPU's memory, as far as that shows without one; the exchange is in test_publish."""

from __future__ import annotations

import base64
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

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
