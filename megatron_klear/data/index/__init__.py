"""SFT rows, tokenized once into Megatron-Core's indexed format, and read from there."""

from __future__ import annotations

from megatron_klear.data.index.build import prepare_index
from megatron_klear.data.index.files import IndexSource, describe_source
from megatron_klear.data.index.lengths import IndexedLengths, indexed_lengths
from megatron_klear.data.index.reading import SftIndex

__all__ = ["IndexSource", "IndexedLengths", "SftIndex", "describe_source", "indexed_lengths", "prepare_index"]
