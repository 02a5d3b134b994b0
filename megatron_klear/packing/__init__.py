"""Sequences of very different lengths into packed microbatches, and per-token results back out of them."""

from __future__ import annotations

from megatron_klear.packing.bins import EpochBins, bins_of, deal_bins, plan_bins
from megatron_klear.packing.deal import STEPS_AHEAD, deal_step, rank_costs
from megatron_klear.packing.flops import attention_share, sequence_cost
from megatron_klear.packing.layout import pack_multiple, sequence_multiple, zigzag_indices
from megatron_klear.packing.order import seeded_order
from megatron_klear.packing.oversize import OversizePolicy, fitting_sequences, require_some
from megatron_klear.packing.pack import pack, unpack
from megatron_klear.packing.plan import PackPlan, plan_packs

__all__ = [
    "STEPS_AHEAD",
    "EpochBins",
    "OversizePolicy",
    "PackPlan",
    "attention_share",
    "bins_of",
    "deal_bins",
    "deal_step",
    "fitting_sequences",
    "pack",
    "pack_multiple",
    "plan_bins",
    "plan_packs",
    "rank_costs",
    "require_some",
    "seeded_order",
    "sequence_cost",
    "sequence_multiple",
    "unpack",
    "zigzag_indices",
]
