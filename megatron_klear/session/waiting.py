"""The word on data-parallel ranks that would wait for one another, before a run and at its start; no torch."""

from __future__ import annotations

from megatron_klear.config import Settings

UNEVEN = 0.03
"""Share of its time that a rank may wait before it is worth a word."""
_BINS_PER_RANK = 4
"""With fewer bins to each rank, what these cost does not even out."""


def word_on_waiting(settings: Settings, *, slowest: float, mean_tokens: float, dp: int) -> str | None:
    """What is uneven, and which setting evens it; None where no rank waits for long.

    Args:
        settings: `sft` and `packing` count.
        slowest: work of the rank with the most over the mean.
        mean_tokens: of a sequence.
        dp: data-parallel ranks.
    """
    sft, uneven = settings.sft, slowest - 1
    if dp == 1 or uneven <= UNEVEN:
        return None
    told = f"the slowest of {dp} data-parallel ranks has {uneven:.0%} more to do than the mean, and all wait for it"
    if sft.batch_bins is not None:
        more = max(_BINS_PER_RANK, -(-2 * sft.batch_bins // dp)) * dp
        return f"sft.batch_bins={sft.batch_bins}: {told}; {more} would be more even"
    alike = sft.batch_sequences * mean_tokens / settings.packing.token_budget
    bins = max(_BINS_PER_RANK, round(alike / dp)) * dp
    sequences = bins * settings.packing.token_budget / mean_tokens
    return (
        f"sft.batch_sequences={sft.batch_sequences}: {told}; sft.batch_bins={bins}, with some {sequences:.0f} "
        "sequences, would be more even, and fewer data-parallel ranks (parallel.cp, parallel.tp) need fewer bins"
    )
