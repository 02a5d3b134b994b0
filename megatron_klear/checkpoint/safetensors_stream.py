"""Reads and writes safetensors files piece by piece, so that no more than a piece is ever in memory.

The format is eight bytes with the header's length, a JSON header that says where every tensor lies, then the
tensors' bytes. All shapes are known before a conversion starts, so the header can be written first. Files are
read with plain reads, not mapped: mapped pages would count as memory, and a file cut short under a mapping
kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_klear.checkpoint.layout import flush_to_disk
from megatron_klear.errors import DataError

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The number formats that are converted; integers, float8 and float64 are refused."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        code: number format as the file names it.
        shape: its shape.
        start: byte offset in the file.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Number format; only of tensors whose `code` is in `DTYPES`."""
        return DTYPES[self.code]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows `start` to `stop` of the first dimension.

        Raises:
            DataError: the file cannot be read or has become shorter.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(self.start + start * row_bytes)
                while done < len(view):
                    count = opened.readinto(view[done:])
                    if not count:
                        raise DataError(f"{self.file} ends early; it was cut short while being read")
                    done += count
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read: {error.strerror or error}") from error
        return buffer.view(self.dtype).view(stop - start, *self.shape[1:])

    def whole(self) -> torch.Tensor:
        """Read all of it."""
        return self.rows(0, self.shape[0])


def read_header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name, none of them read.

    Raises:
        DataError: not a whole safetensors file; says why.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise DataError(f"{file}: not a safetensors file, or cut short ({size} bytes)")
            header = json.loads(opened.read(length))
        found = {name: _stored(file, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        ends = {name: stored.start + _num_bytes(header[name]) for name, stored in found.items()}
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: its safetensors header is damaged ({error})") from error
    short = [name for name, end in ends.items() if end > size]
    if short:
        raise DataError(f"{file}: cut short at {size} bytes; {len(short)} tensors lie beyond, the first is {short[0]}")
    for name, stored in found.items():
        expected = math.prod(stored.shape) * DTYPES[stored.code].itemsize if stored.code in DTYPES else None
        if expected is not None and expected != _num_bytes(header[name]):
            raise DataError(f"{file}: {name} has {_num_bytes(header[name])} bytes, its shape needs {expected}")
    return found


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets are {[begin, end]}")
    return int(begin), int(end)


def _stored(file: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    shape = tuple(int(n) for n in entry["shape"])
    return StoredTensor(file=file, code=str(entry["dtype"]), shape=shape, start=data_start + _span(entry)[0])


def _num_bytes(entry: dict[str, Any]) -> int:
    begin, end = _span(entry)
    return end - begin


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor that is going to be written.

    Attributes:
        name: its name.
        dtype: its number format.
        shape: its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Sequence[TensorEntry], shard_bytes: float) -> dict[str, list[TensorEntry]]:
    """Which file holds which tensors, in order; a tensor larger than `shard_bytes` has a file of its own."""
    shards: list[list[TensorEntry]] = []
    filled = math.inf
    for entry in entries:
        if filled + entry.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def write_shards(
    directory: Path,
    entries: Sequence[TensorEntry],
    shard_bytes: float,
    tensors: Iterator[Iterable[torch.Tensor]],
    *,
    written: Callable[[TensorEntry], None],
) -> None:
    """Write tensors into as many files as needed, with an index when there are several.

    Args:
        directory: an existing directory.
        entries: what is written, in order.
        shard_bytes: a file is closed before it would grow beyond this.
        tensors: for every entry, in the same order, its data in one or more blocks of rows.
        written: called when an entry has been written.
    """
    shards = plan_shards(entries, shard_bytes)
    for name, shard in shards.items():
        with (directory / name).open("wb", buffering=0) as out:
            _write_all(out.fileno(), _header(shard))
            for entry in shard:
                _write_blocks(out.fileno(), entry, next(tensors))
                written(entry)
            os.fsync(out.fileno())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
            "weight_map": {entry.name: name for name, shard in shards.items() for entry in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        flush_to_disk(directory / INDEX)


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_blocks(file: int, entry: TensorEntry, blocks: Iterable[torch.Tensor]) -> None:
    written = 0
    for block in blocks:
        if block.dtype != entry.dtype or block.shape[1:] != entry.shape[1:]:
            raise ValueError(f"{entry.name}: {block.dtype} {list(block.shape)} does not fit {entry}")
        # Tensors of no elements have no memory to view.
        if block.numel():
            _write_all(file, block.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        written += block.numel() * block.element_size()
    if written != entry.num_bytes:
        raise ValueError(f"{entry.name}: {written} bytes were given, {entry.num_bytes} announced")


def _write_all(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
