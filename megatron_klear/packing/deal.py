"""The microbatches of every data-parallel rank for one step, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_klear.config import BIN_MULTIPLE
from megatron_klear.packing.bins import deal_bins
from megatron_klear.packing.flops import sequence_cost
from megatron_klear.packing.layout import round_up
from megatron_klear.packing.plan import Bins, plan_packs
from megatron_klear.records import IntArray

STEPS_AHEAD = 6
"""Steps whose mean tells how evenly a run's work will lie on data-parallel ranks."""


def deal_step(
    lengths: IntArray, bins: Bins | None, *, token_budget: int, dp_size: int, multiple: int, share: float
) -> list[Bins]:
    """Microbatches of every data-parallel rank, as positions in `lengths`: [dp][number of microbatches].

    Args:
        lengths: tokens of the step's sequences, int64 [N].
        bins: full bins that they lie in; dealt out as they are where each rank gets equally many. None, or any other
            number of them: sequences are packed anew.
        token_budget: tokens of a microbatch over its context-parallel group.
        dp_size: data-parallel ranks.
        multiple: sequences are padded to a multiple of this, see `sequence_multiple`.
        share: attention's share of the cost, see `attention_share`.
    """
    if bins is not None and len(bins) % dp_size == 0:
        cost = sequence_cost(round_up(lengths, BIN_MULTIPLE), share)
        of_bins = np.array([cost[members].sum() for members in bins])
        return [[bins[b] for b in dealt] for dealt in deal_bins(of_bins, dp_size)]
    packed = plan_packs(lengths, token_budget=token_budget, dp_size=dp_size, multiple=multiple, share=share)
    return [[list(members) for members in rank] for rank in packed.microbatches]


def rank_costs(lengths: IntArray, ranks: Sequence[Bins], share: float) -> NDArray[np.float64]:
    """What each data-parallel rank has to do, padding left out: float64 [dp].

    Args:
        lengths: tokens of the step's sequences, int64 [N].
        ranks: their microbatches, from `deal_step`.
        share: attention's share of the cost.
    """
    cost = sequence_cost(lengths, share)
    return np.array([sum(float(cost[members].sum()) for members in rank) for rank in ranks])
