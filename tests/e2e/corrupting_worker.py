"""train_rl whose tensor transport damages one element of one tensor of the publish after the first.

python corrupting_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

from megatron_klear import train_rl
from megatron_klear.session import transports
from megatron_klear.session.launch import leave, run_entry
from megatron_klear.weight_sync import TensorTransport
from megatron_klear.weight_sync.buckets import Bucket

DAMAGED = "model.layers.1.self_attn.k_proj.weight"


class Damaging(TensorTransport):
    """Sends version 0 as it is."""

    def begin(self, version: int) -> None:
        self.version = version
        super().begin(version)

    def send(self, bucket: Bucket) -> None:
        tensors = list(bucket.tensors)
        if self.version > 0 and DAMAGED in bucket.names:
            place = bucket.names.index(DAMAGED)
            tensors[place] = tensors[place].clone()
            tensors[place].view(-1)[5] += 1e-3
        super().send(Bucket(names=bucket.names, tensors=tuple(tensors)))


if __name__ == "__main__":
    transports.TensorTransport = Damaging  # type: ignore[misc]
    leave(run_entry("rl", train_rl.main))
