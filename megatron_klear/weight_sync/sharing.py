"""Weights to engines on the trainer's own GPUs: every rank offers its copy of a bucket, no byte passes the host.

A rank's offer is a handle that another process of the same GPU opens (CUDA IPC), some hundred bytes of text. Without
GPUs it names a file of shared memory, so that the exchange is the same and is tested there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import reductions

from megatron_klear.errors import WeightSyncError
from megatron_klear.records import ParallelContext
from megatron_klear.weight_sync.buckets import Bucket
from megatron_klear.weight_sync.engines import EngineCaller, EngineGroup
from megatron_klear.weight_sync.tensor_transport import UPDATE_PATH, contents, serialized, update_body
from megatron_klear.weight_sync.transport import UpdateSession

_DEVICE = 6
"""Place of the device's number among the arguments of torch's `rebuild_cuda_tensor`."""


class BucketSharing:
    """Every rank's offer of the bucket that is being sent; made on all ranks.

    Args:
        context: the trainer's layout.

    Attributes:
        offers: on the first rank, how each rank's copy of the bucket is opened, in the order of ranks.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._held: torch.Tensor | None = None
        self.offers: list[str] = []

    def offer(self, bucket: Bucket) -> None:
        """Offer this rank's copy, and let go of the one before (a collective).

        Raises:
            WeightSyncError: on every rank, naming those that cannot offer theirs.
        """
        flat: torch.Tensor | None = None
        offer: tuple[str | None, str] = (None, "")
        try:
            flat = bucket.flat().to(self._context.device)
            offer = serialized_here(contents(bucket, flat)), ""
        except Exception as error:  # no memory, no handle: told to all, which would wait for this rank's offer
            offer = None, f"{type(error).__name__}: {error}"
        offers: list[Any] = [None] * self._context.world.size
        # The first rank joins in when its engines have loaded the bucket before: until then that one must live.
        dist.all_gather_object(offers, offer)
        failures = [f"rank {rank}: {text}" for rank, (handle, text) in enumerate(offers) if handle is None]
        if failures:
            raise WeightSyncError(f"no copy of the weights can be offered to the engines: {'; '.join(failures)}")
        self._held, self.offers = flat, [handle for handle, _ in offers]

    def release(self) -> None:
        """Let go of what was offered; the engines have loaded it."""
        self._held, self.offers = None, []
        if self._context.device.type == "cuda":
            torch.cuda.ipc_collect()


class SharedTransport:
    """Gives every rank of an engine what the trainer's rank on its GPU offers; implements `Transport`.

    Args:
        engines: who loads.
        sharing: this rank's; a bucket has been offered before it is sent.
        ranks_of: the trainer's ranks on an engine's GPUs, in the order of the engine's ranks.
    """

    def __init__(
        self, engines: EngineGroup, sharing: BucketSharing, ranks_of: Callable[[EngineCaller], Sequence[int]]
    ) -> None:
        self._engines, self._sharing, self._ranks_of = engines, sharing, ranks_of
        self._session = UpdateSession(engines)

    def begin(self, version: int) -> None:
        """Open an update session."""
        self._session.begin()

    def send(self, bucket: Bucket) -> None:
        """Have the engines load what was offered, and wait for that."""
        offers = self._sharing.offers
        bodies = [update_body([offers[rank] for rank in self._ranks_of(c)]) for c in self._engines.callers]
        self._session.follow(self._engines.start(UPDATE_PATH, bodies))
        self._session.wait()

    def finish(self) -> None:
        """Close the session."""
        self._session.end()

    def close(self) -> None:
        """Nothing is held."""


def serialized_here(value: dict[str, Any]) -> str:
    """As `serialized`, and tensors on a GPU as handles that name it by its UUID.

    Two processes may number the same GPU differently; SGLang looks the UUID up among those that it sees.
    """
    if value["flattened_tensor"].device.type != "cuda":
        return serialized(value)
    buffer = io.BytesIO()
    _HandlePickler(buffer).dump(value)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class _HandlePickler(ForkingPickler):
    """Pickles a GPU's tensors as handles of their memory."""

    def reducer_override(self, value: object) -> Any:
        """What stands for a tensor of a GPU; everything else goes its usual way."""
        if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
