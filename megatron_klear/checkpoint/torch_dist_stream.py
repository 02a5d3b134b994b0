"""Writes and reads Megatron's distributed checkpoints (`torch_dist`) piece by piece, in one process, without a model.

A checkpoint in this format is a set of *chunks*: boxes of whole tensors. Layers are stacked into one tensor with
the layer number in front. A loader takes what overlaps with the shards it needs, so chunks may be cut freely and
the checkpoint fits every layout. The files themselves are written and read by torch's own writer and reader; only
the plan, and when a tensor comes into memory, are decided here.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_klear.errors import CheckpointError

_FILE_BYTES = 1_000_000_000
"""Files are closed at about this size, so that several processes can check and read them side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of a tensor that is going to be written.

    Attributes:
        key: the tensor's name in the checkpoint.
        whole_shape: shape of the whole tensor.
        offsets: where the box begins.
        shape: shape of the box, of as many dimensions as the whole.
        dtype: number format of the whole tensor.
        read: returns the box's data; it is called when its turn to be written has come.
    """

    key: str
    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        """It as torch's writer wants it."""
        return WriteItem(
            index=MetadataIndex(self.key, torch.Size(self.offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=torch.Size(self.shape)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.whole_shape),
            ),
        )


class _Supply(DefaultSavePlanner):
    """Gives torch's writer the data of one chunk after the other."""

    def __init__(self, chunks: Sequence[Chunk], written: Callable[[Chunk], None]) -> None:
        super().__init__()
        self.chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self.written = written
        self.given: torch.Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # Megatron stores a list of the shards' objects
            return nothing
        self.release()
        index = write_item.index
        assert index.offset is not None
        chunk = self.chunks[index.fqn, tuple(index.offset)]
        data = chunk.read().to(chunk.dtype).contiguous().view(chunk.shape)
        storage = data.untyped_storage()
        if storage.nbytes() != data.nbytes or not storage.resizable():
            data = data.clone()  # so that its memory is its own and can be released
        self.given = data
        self.written(chunk)
        return data

    def release(self) -> None:
        """Free the chunk that was written last: torch's writer holds on to one per key until its file ends."""
        if self.given is not None:
            self.given.untyped_storage().resize_(0)
            self.given = None


def write_torch_dist(
    directory: Path,
    chunks: Sequence[Chunk],
    *,
    empty_objects: Sequence[str] = (),
    common: dict[str, Any],
    written: Callable[[Chunk], None],
) -> None:
    """Write a checkpoint that `megatron.core.dist_checkpointing.load` reads; holds one chunk at a time.

    Args:
        directory: an existing, empty directory.
        chunks: the tensors.
        empty_objects: unique keys of stored objects that are None.
        common: what is not a tensor.
        written: called as a chunk goes to disk.
    """
    items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in empty_objects]
    plans, filled = [SavePlan(items)], 0
    for chunk in chunks:
        if filled + chunk.num_bytes > _FILE_BYTES and filled:
            plans.append(SavePlan([]))
            filled = 0
        plans[-1].items.append(chunk.write_item())
        filled += chunk.num_bytes
    # Without copying ahead, which a machine with CUDA would do, there is no more than one chunk in memory.
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan(plans)
    supply = _Supply(chunks, written)
    results = []
    # Every plan has a file, named as if that many ranks had written them.
    for plan in writer.prepare_global_plan(plans):
        results.append(writer.write_data(plan, supply).wait())
        supply.release()
    writer.finish(metadata, results)
    torch.save(common, directory / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


class _IntoTensor(DefaultLoadPlanner):
    """Lets torch's reader fill one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        box = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            box = box.narrow(dim, start, length)
        return box

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class TorchDistReader:
    """The tensors of a checkpoint, read box by box.

    Args:
        directory: the checkpoint.

    Attributes:
        shapes: shape of every whole tensor by key.
        dtypes: number format of every tensor by key.
        object_keys: what else is stored.

    Raises:
        CheckpointError: there is no readable list of its contents.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = FileSystemReader(directory)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:  # unpickling damaged bytes raises anything
            raise CheckpointError(f"{directory}: cannot read what the checkpoint holds ({error})") from error
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.object_keys = set(metadata.state_dict_metadata) - set(self._tensors)
        self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in self._tensors.items()}

    def row_blocks(self, key: str) -> list[tuple[int, int]]:
        """Where the stored chunks cut a tensor's first dimension, as ranges of rows from first to last."""
        chunks = self._tensors[key].chunks
        cuts = sorted({edge for c in chunks for edge in (c.offsets[0], c.offsets[0] + c.sizes[0])})
        return list(itertools.pairwise(cuts))

    def read(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Read a box of a tensor; holds the box and one stored chunk.

        Raises:
            CheckpointError: the stored chunks do not cover it, or cannot be read.
        """
        entry = self._tensors[key]
        target = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.directory}: {key} is not stored completely")
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except Exception as error:  # torch's reader raises whatever unpickling and unzipping meet
            raise CheckpointError(f"{self.directory}: {key} cannot be read ({error})") from error
        return target
