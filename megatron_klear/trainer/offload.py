"""A trainer's state off its device and back, while others use the memory: gradients, optimizer, weights.

What leaves is emptied in place: each storage is copied to the host and resized to nothing. Whatever looks into it
(parameters, Megatron's buckets, the optimizer's shards of them) stays the object that it is, and is right again when
the storage has its size and content back. Megatron-Core 0.16.1 does the same with its gradient buffers, and that is
used here. Its way for the optimizer is not: it gives each of the optimizer's parameters another tensor, so that in
float32, where these are views of the model's weights, updates would no longer reach the model.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from megatron_klear.errors import TrainingError
from megatron_klear.observe import host_free_bytes
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.trainer.optimizer import TrainableModel

log = logging.getLogger(__name__)

Part = Literal["gradients", "optimizer", "weights"]
PARTS: tuple[Part, ...] = get_args(Part)


class TrainerMemory:
    """Moves parts of a trainer's state between its device and the host, bit by bit the same.

    `gradients` are dropped, not copied: they are 0 when they come back. `optimizer` is all that the optimizer holds
    beside weights and gradients: float32 weights, where the model's are not, and its moments.

    Args:
        trainable: whose state.
    """

    def __init__(self, trainable: TrainableModel) -> None:
        self._trainable = trainable
        self._device = next(trainable.model.parameters()).device
        self._away: dict[Part, list[_Stored]] = {}
        self._host: dict[Part, dict[int, torch.Tensor]] = {}

    def away(self) -> set[Part]:
        """The parts that are not on the device."""
        return set(self._away)

    def num_bytes(self, part: Part) -> int:
        """Bytes that a part takes on the device now."""
        return sum(storage.nbytes() for storage in self._storages(part))

    def require(self, *parts: Part) -> None:
        """Refuse to go on without parts that something is about to be computed with.

        Raises:
            TrainingError: names those that are away.
        """
        missing = [part for part in parts if part in self._away]
        if missing:
            raise TrainingError(
                f"the trainer's {' and '.join(missing)} gave way to the engines (sglang.placement=colocated) and were "
                "not brought back; this is a mistake in the program"
            )

    def offload(self, *parts: Part) -> None:
        """Free the device's memory of these parts; those that are away already stay so.

        Raises:
            TrainingError: the host has no room for them, or a storage cannot be emptied.
        """
        leaving = [part for part in PARTS if part in parts and part not in self._away]
        self._require_room([part for part in leaving if part != "gradients"])
        for part in leaving:
            if part == "gradients":
                with cuda_means_cpu(), _unwarned():
                    self._trainable.optimizer.zero_grad()  # lets go of what looks into the buffers
                    self._trainable.ddp.offload_grad_buffers(empty_cache=False)
                self._away[part] = []
            else:
                self._away[part] = self._copy_and_empty(part)
        if leaving and self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self, *parts: Part) -> None:
        """Bring these parts back, the gradients as 0; those that are there already stay as they are.

        Raises:
            TrainingError: the device has no room for them.
        """
        coming = [part for part in reversed(PARTS) if part in parts and part in self._away]
        try:
            for part in coming:
                if part == "gradients":
                    with cuda_means_cpu(), _unwarned():
                        self._trainable.ddp.restore_grad_buffers()
                for stored in self._away[part]:
                    stored.fill()
                del self._away[part]
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"no room on {self._device} for the trainer's {', '.join(coming)}, which had given way to the engines: "
                f"{str(error).splitlines()[0]} Other processes may use this GPU; or lower sglang.memory_fraction"
            ) from error
        if coming and self._device.type == "cuda":
            torch.cuda.synchronize()

    def _storages(self, part: Part) -> list[torch.UntypedStorage]:
        """The device's storages of a part, each once."""
        weights = _unique(self._trainable.model.parameters())
        if part == "weights":
            return list(weights.values())
        buffers = [*self._trainable.ddp.buffers, *self._trainable.ddp.expert_parallel_buffers]
        gradients = _unique(buffer.grad_data for buffer in buffers)
        if part == "gradients":
            return list(gradients.values())
        held = _unique(_optimizer_tensors(self._trainable))
        return [
            storage
            for key, storage in held.items()
            if key not in weights and key not in gradients and storage.device == self._device
        ]

    def _copy_and_empty(self, part: Part) -> list[_Stored]:
        """Copy all storages of a part before the first is emptied, so that a failure leaves everything as it was."""
        storages = self._storages(part)
        for storage in storages:
            if not storage.resizable():
                raise TrainingError(
                    f"a storage of the trainer's {part} on {storage.device} cannot be given back; set "
                    "sglang.placement=separate"
                )
        before = self._host.get(part, {})
        stored = [_Stored(storage, before.get(storage._cdata)) for storage in storages]
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the copies run beside this thread
        for one in stored:
            one.storage.resize_(0)
        # Kept, so that pages are pinned once; a storage that is gone takes its own with it.
        self._host[part] = {one.storage._cdata: one.host for one in stored}
        return stored

    def _require_room(self, parts: list[Part]) -> None:
        needed = sum(
            storage.nbytes()
            for part in parts
            for storage in self._storages(part)
            if storage._cdata not in self._host.get(part, {})
        )
        ranks, free = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), host_free_bytes()
        if 0 < free < needed * ranks:
            raise TrainingError(
                f"the host has {free / 1e9:.1f} GB free, and the trainer's {' and '.join(parts)} of its {ranks} ranks "
                f"need about {needed * ranks / 1e9:.1f} GB there while the engines generate (sglang.placement, "
                "sglang.offload_weights)"
            )


class _Stored:
    """A storage and its content on the host.

    Args:
        storage: is copied, and left as it is.
        host: uint8 memory of an earlier copy, used again when it has the right size.
    """

    def __init__(self, storage: torch.UntypedStorage, host: torch.Tensor | None) -> None:
        self.storage, self._num_bytes = storage, storage.nbytes()
        if host is None or host.numel() != self._num_bytes:
            host = _host_memory(self._num_bytes, pinned=storage.device.type == "cuda")
        self.host = host
        self.host.copy_(_as_bytes(storage), non_blocking=True)

    def fill(self) -> None:
        """Give the storage its size and content back."""
        self.storage.resize_(self._num_bytes)
        _as_bytes(self.storage).copy_(self.host, non_blocking=True)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Around Megatron's buffers, which ask for storages in a way that torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            log.warning("%d bytes of host memory cannot be pinned (%s); copies will be slower", num_bytes, error)
    return torch.empty(num_bytes, dtype=torch.uint8)


def _unique(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage
    return found


def _optimizer_tensors(trainable: TrainableModel) -> Iterator[torch.Tensor]:
    """Parameters and state of every optimizer that Megatron chains."""
    for megatron in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer]):
        if getattr(megatron, "is_stub_optimizer", False):
            continue
        for group in megatron.optimizer.param_groups:
            yield from group["params"]
        yield from _tensors_in(megatron.optimizer.state)


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
