"""What happens to a sequence that is longer than a microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_klear.errors import DataError
from megatron_klear.packing.layout import round_up
from megatron_klear.records import IntArray

OversizePolicy = Literal["refuse", "drop"]

_NAMED = 20
"""Sequences that a message names; of the others only the number."""


class Names(Protocol):
    """Names of sequences for messages, by number."""

    def __getitem__(self, number: int, /) -> str: ...


def fitting_sequences(
    lengths: Sequence[int] | NDArray[np.integer],
    *,
    token_budget: int,
    multiple: int = 1,
    oversize: OversizePolicy = "refuse",
    names: Names | None = None,
) -> tuple[IntArray, IntArray]:
    """Split sequences into those that fit into a microbatch and those that do not.

    Dropping has to come before denominators are computed, so entries call this on their data first.

    Args:
        lengths: tokens of each sequence, [N].
        token_budget: tokens of a microbatch over its context-parallel group (packing.token_budget).
        multiple: each sequence is padded to a multiple of this; the padding counts.
        oversize: `refuse` or `drop` (packing.oversize).
        names: names for messages, [N]; by default the numbers of the sequences.

    Returns:
        Indices of the sequences that fit and of those that were dropped, both int64 and ascending.

    Raises:
        DataError: under `refuse`, naming the sequences that do not fit.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    too_long = round_up(counts, multiple) > token_budget
    kept, dropped = np.flatnonzero(~too_long), np.flatnonzero(too_long)
    if len(dropped) and oversize == "refuse":
        padding = f" (padded to a multiple of {multiple})" if multiple > 1 else ""
        count = "1 sequence does" if len(dropped) == 1 else f"{len(dropped)} sequences do"
        lines = [f"{count} not fit into a microbatch of packing.token_budget = {token_budget} tokens{padding}:"]
        for index in dropped[:_NAMED].tolist():
            name = f"number {index}" if names is None else names[index]
            lines.append(f"  - sequence {name}: {counts[index]} tokens")
        if len(dropped) > _NAMED:
            lines.append(f"  ... and {len(dropped) - _NAMED} more")
        longest = int(round_up(counts, multiple).max())
        lines.append(f"Set packing.token_budget to at least {longest}, or packing.oversize=drop to leave them out.")
        raise DataError("\n".join(lines))
    return kept, dropped
