"""Whether data-parallel ranks will wait for one another, told before the first step from the data itself."""

from __future__ import annotations

import copy
import logging

import numpy as np

from megatron_klear.config import Settings
from megatron_klear.data import SftData, Steps
from megatron_klear.packing import STEPS_AHEAD, rank_costs
from megatron_klear.session.waiting import word_on_waiting
from megatron_klear.trainer import PackLayout, deal_step

log = logging.getLogger(__name__)


def slowest_rank(data: SftData, steps: Steps, layout: PackLayout, num_steps: int = STEPS_AHEAD) -> float:
    """Work of the rank with the most over the mean, of the next steps, 1.0 being perfect.

    Args:
        data: the rows.
        steps: the walk over them; it is not moved on.
        layout: of any of the ranks.
        num_steps: how many steps are looked at.
    """
    ahead, found = copy.deepcopy(steps), []
    for _ in range(num_steps):
        plan = ahead.next_step()
        lengths = data.lengths[plan.rows]
        costs = rank_costs(lengths, deal_step(plan, lengths, layout), layout.share)
        found.append(costs.max() / costs.mean())
    return float(np.mean(found))


def warn_of_waiting(settings: Settings, data: SftData, steps: Steps, layout: PackLayout) -> None:
    """Warn where ranks have uneven work, and say which setting evens it."""
    dp = layout.dp_size
    slowest = slowest_rank(data, steps, layout) if dp > 1 else 1.0
    word = word_on_waiting(settings, slowest=slowest, mean_tokens=float(data.lengths.mean()), dp=dp)
    if word is not None:
        log.warning("%s", word)
