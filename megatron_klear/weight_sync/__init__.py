"""The trainer's weights to serving engines: several transports, versions that go up, and a proof of every publish."""

from __future__ import annotations

from megatron_klear.weight_sync.distributed_transport import DistributedTransport
from megatron_klear.weight_sync.engines import EngineCaller, EngineGroup, EngineLayout
from megatron_klear.weight_sync.handle_check import why_not_shared
from megatron_klear.weight_sync.publisher import Publisher, PublishReport, common_layout
from megatron_klear.weight_sync.restoring import restore
from megatron_klear.weight_sync.shared_memory import lack_of_shared_memory
from megatron_klear.weight_sync.sharing import BucketSharing, SharedTransport
from megatron_klear.weight_sync.tensor_transport import TensorTransport
from megatron_klear.weight_sync.transport import DiskTransport, KeepingTransport, Transport
from megatron_klear.weight_sync.weight_files import WeightFiles

__all__ = [
    "BucketSharing",
    "DiskTransport",
    "DistributedTransport",
    "EngineCaller",
    "EngineGroup",
    "EngineLayout",
    "KeepingTransport",
    "PublishReport",
    "Publisher",
    "SharedTransport",
    "TensorTransport",
    "Transport",
    "WeightFiles",
    "common_layout",
    "lack_of_shared_memory",
    "restore",
    "why_not_shared",
]
