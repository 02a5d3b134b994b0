"""Lengths of an index's conversations without opening it: no torch, nothing made, for plans and checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_klear.config import Settings, row_files
from megatron_klear.data.index import files
from megatron_klear.data.index.files import describe_source
from megatron_klear.errors import DataError
from megatron_klear.records import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedLengths:
    """What is known of the lengths of `data.sft` before a run.

    Attributes:
        lengths: int64 [N], tokens of each conversation of the index; None without one that can be read.
        told: where the index lies, or why there is none.
    """

    lengths: IntArray | None
    told: str


def indexed_lengths(settings: Settings) -> IndexedLengths:
    """Look for the index that a run with these settings would use, and read its lengths."""
    data, tokenizer = settings.data, settings.tokenizer
    if not data.sft:
        return IndexedLengths(lengths=None, told="data.sft names no files")
    try:
        source = describe_source(
            row_files(data.sft), tokenizer.dir, tokenizer.think_start, tokenizer.think_end, index_dir=data.index_dir
        )
    except DataError:
        return IndexedLengths(lengths=None, told="the files of data.sft cannot be seen from here")
    except OSError:
        return IndexedLengths(lengths=None, told="tokenizer.dir cannot be seen from here")
    if not (source.directory / files.MANIFEST).is_file():
        return IndexedLengths(
            lengths=None, told="data.sft is not tokenized yet (python -m megatron_klear.data does that)"
        )
    try:
        return IndexedLengths(lengths=_read(source.directory), told=str(source.directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return IndexedLengths(lengths=None, told=f"the index of data.sft cannot be read ({error})")


def _read(directory: Path) -> IntArray:
    import pyarrow.parquet as pq

    manifest = json.loads((directory / files.MANIFEST).read_text(encoding="utf-8"))
    lengths: IntArray = pq.read_table(directory / files.ROWS, columns=["tokens"])["tokens"].to_numpy().astype(np.int64)
    if len(lengths) != manifest["conversations"] or not len(lengths):
        raise ValueError(f"it has {len(lengths)} rows of {manifest['conversations']} conversations")
    return lengths
