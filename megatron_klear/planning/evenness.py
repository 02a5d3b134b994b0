"""How evenly a step's work lies on data-parallel ranks, found by packing a few steps as the run itself packs them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_klear.config import Entry, Settings
from megatron_klear.packing import attention_share, deal_step, rank_costs, sequence_multiple
from megatron_klear.planning.lengths import StoredLengths, Updates, drawn_updates
from megatron_klear.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """Means over some updates of a run.

    Attributes:
        microbatches: of one update on each rank, or of the scoring pass.
        slowest: work of the rank with the most over the mean of all, 1.0 being perfect.
        slots_used: share of the microbatches' token budgets that holds a token.
    """

    microbatches: float
    slowest: float
    slots_used: float

    @property
    def whole_microbatches(self) -> int:
        """Microbatches of one update or pass, as a whole number."""
        return max(1, round(self.microbatches))


def evenness(
    settings: Settings, entry: Entry, work: Workload, dp: int, stored: StoredLengths | None = None
) -> Evenness:
    """Pack some updates: the first ones of a run where its lengths are known, else drawn ones, always the same.

    Args:
        settings: settings that fit together.
        entry: `sft` or `rl`.
        work: the planned step.
        dp: data-parallel ranks.
        stored: lengths by the index of `data.sft`.
    """
    if stored is not None:
        return _pack(settings, stored.updates, dp)
    bins = settings.sft.batch_bins if entry == "sft" else None
    return _pack(settings, _drawn(settings, work, max(1, work.sequences // work.updates), bins), dp)


def scoring_evenness(settings: Settings, work: Workload, dp: int) -> Evenness:
    """The same for the pass that scores a step of RL: it packs all sequences of the step at once.

    Args:
        settings: settings that fit together.
        work: the planned step.
        dp: data-parallel ranks.
    """
    return _pack(settings, _drawn(settings, work, work.sequences, None), dp)


def filled_share(settings: Settings, work: Workload) -> float:
    """Share of bins' positions that hold a token, in the steps of an epoch of drawn lengths; 1 without bins.

    A step's sequences follow from it and the mean that is planned with, as drawn lengths have a mean of their own.

    Args:
        settings: settings that fit together.
        work: with the lengths' mean and the longest; its number of sequences is not read.
    """
    bins, budget = settings.sft.batch_bins, settings.packing.token_budget
    if bins is None:
        return 1.0
    steps = _drawn(settings, work, work.sequences, bins).steps
    filled = sum(int(lengths.sum()) for lengths, _ in steps)
    return filled / (budget * sum(len(taken or ()) for _, taken in steps))


def _drawn(settings: Settings, work: Workload, sequences: int, bins: int | None) -> Updates:
    share = attention_share(settings.architecture)
    if bins is not None:  # the same epoch however full it turns out
        sequences = max(1, round(bins * settings.packing.token_budget / work.mean_tokens))
    mean, budget = round(work.mean_tokens, 3), settings.packing.token_budget
    return drawn_updates(mean, work.longest, sequences, bins, budget, share)


def _pack(settings: Settings, updates: Updates, dp: int) -> Evenness:
    share, multiple = attention_share(settings.architecture), sequence_multiple(settings.parallel.cp)
    return _packed(updates, dp, multiple, settings.packing.token_budget, share)


@lru_cache(maxsize=1024)
def _packed(updates: Updates, dp: int, multiple: int, budget: int, share: float) -> Evenness:
    found = []
    for lengths, bins in updates.steps:
        ranks = deal_step(lengths, bins, token_budget=budget, dp_size=dp, multiple=multiple, share=share)
        work, count = rank_costs(lengths, ranks, share), len(ranks[0])
        found.append((float(count), float(work.max() / work.mean()), float(lengths.sum()) / (dp * count * budget)))
    microbatches, slowest, slots = np.mean(found, axis=0).tolist()
    return Evenness(microbatches=microbatches, slowest=slowest, slots_used=slots)
