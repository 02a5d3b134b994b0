"""What one step computes: how many sequences of which lengths, in how many microbatches and updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from megatron_klear.config import Entry, Settings
from megatron_klear.records import IntArray

_QUANTILES = 512
SPREAD = 1.0
"""Standard deviation of the logarithm of a sequence's length: chains of thought have a long tail."""

MEAN_SHARE = 10_000 / 32_768
"""Mean length over the longest, where no mean is given: about 10K tokens for the paper's 32K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of a run on all ranks.

    Attributes:
        sequences: trained on in a step.
        mean_tokens: of one sequence, prompt included.
        mean_square: mean of the squared length.
        updates: optimizer updates of a step.
        scored: whether old logprobs are computed first, by a forward pass over all sequences.
        longest: tokens of the longest sequence.
    """

    sequences: int
    mean_tokens: float
    mean_square: float
    updates: int
    scored: bool
    longest: int

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        return self.sequences * self.mean_tokens


def idle_ranks(settings: Settings, entry: Entry, gpus: int) -> list[str]:
    """Why so many ranks are too many, if they are: some would have no sequence, or no bin, of an update.

    Args:
        settings: settings that fit together.
        entry: `sft` or `rl`.
        gpus: ranks of the trainer.
    """
    parallel = settings.parallel
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    if entry == "rl":
        count = settings.rl.minibatch_prompts * settings.rollout.responses_per_prompt
        named = f"{count:,} responses (rl.minibatch_prompts * rollout.responses_per_prompt)"
    elif settings.sft.batch_bins is not None:
        count, named = settings.sft.batch_bins, f"{settings.sft.batch_bins:,} bins (sft.batch_bins)"
    else:
        count = settings.sft.batch_sequences
        named = f"{count:,} sequences (sft.batch_sequences)"
    if dp <= count:
        return []
    shared = f"{parallel.tp} * {parallel.pp} * {parallel.cp}"
    return [
        f"--gpus: got {gpus:,}, which with tp * pp * cp = {shared} are {dp:,} data-parallel ranks, more than an update "
        f"has {named}; take fewer, or a larger update"
    ]


def stored_workload(lengths: IntArray, updates: Sequence[IntArray]) -> Workload:
    """The work of one step of fine-tuning on conversations whose lengths are known.

    Args:
        lengths: int64 [N], tokens of each.
        updates: of each of some updates, those of its sequences.
    """
    wide = lengths.astype(np.float64)
    return Workload(
        sequences=max(1, round(sum(len(update) for update in updates) / len(updates))),
        mean_tokens=float(wide.mean()),
        mean_square=float((wide**2).mean()),
        updates=1,
        scored=False,
        longest=int(lengths.max()),
    )


def workload(
    settings: Settings, entry: Entry, mean_tokens: float | None = None, *, slots_used: float = 1.0
) -> Workload:
    """The work of one step with lengths that are not known.

    Args:
        settings: settings that fit together.
        entry: `sft` (a step is one update) or `rl` (a step is one rollout batch, every group kept).
        mean_tokens: mean length of a sequence; None for `MEAN_SHARE` of the longest.
        slots_used: share of bins' positions that hold a token, where a step is made of bins (`filled_share`).
    """
    budget = min(settings.packing.token_budget, settings.yarn.training_positions(settings.architecture))
    longest = budget
    if entry == "rl":
        longest = min(budget, settings.data.max_prompt_tokens + settings.rollout.max_response_tokens)
    mean = min(mean_tokens or MEAN_SHARE * longest, float(longest))
    lengths = lognormal_lengths(mean, longest)
    square = sum(length * length for length in lengths) / len(lengths)
    if entry == "sft":
        count = settings.sft.batch_sequences
        bins = settings.sft.batch_bins
        if bins is not None:  # full microbatches in place of sequences
            count = max(1, round(bins * settings.packing.token_budget * slots_used / mean))
        return Workload(
            sequences=count, mean_tokens=mean, mean_square=square, updates=1, scored=False, longest=longest,
        )  # fmt: skip
    return Workload(
        sequences=settings.rl.prompts_per_step * settings.rollout.responses_per_prompt,
        mean_tokens=mean,
        mean_square=square,
        updates=settings.rl.prompts_per_step // settings.rl.minibatch_prompts,
        scored=True,
        longest=longest,
    )


@lru_cache(maxsize=64)
def lognormal_lengths(mean: float, longest: int) -> tuple[float, ...]:
    """Quantiles of a log-normal distribution cut off at `longest`, with this mean after the cut."""
    normal = NormalDist()
    scores = [normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)]
    low, high = -5.0, math.log(longest) + 10.0
    for _ in range(80):  # the mean grows with the median
        middle = (low + high) / 2
        if _mean(_cut(scores, middle, longest)) < mean:
            low = middle
        else:
            high = middle
    return tuple(_cut(scores, (low + high) / 2, longest))


def _cut(scores: Sequence[float], log_median: float, longest: int) -> list[float]:
    return [min(float(longest), math.exp(log_median + SPREAD * score)) for score in scores]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
