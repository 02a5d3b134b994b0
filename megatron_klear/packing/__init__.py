"""Sequences of very different lengths into packed microbatches, and per-token results back out of them."""

from __future__ import annotations

from megatron_klear.packing.layout import pack_multiple, sequence_multiple, zigzag_indices
from megatron_klear.packing.oversize import OversizePolicy, fitting_sequences
from megatron_klear.packing.pack import pack, unpack
from megatron_klear.packing.plan import PackPlan, plan_packs

__all__ = [
    "OversizePolicy",
    "PackPlan",
    "fitting_sequences",
    "pack",
    "pack_multiple",
    "plan_packs",
    "sequence_multiple",
    "unpack",
    "zigzag_indices",
]
