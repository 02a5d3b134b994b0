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
        names: names for messages, [N]; without them only the number and the longest are told.

    Returns:
        Indices of the sequences that fit and of those that were dropped, both int64 and ascending.

    Raises:
        DataError: under `refuse`, naming the sequences that do not fit, or saying how many they are.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    too_long = round_up(counts, multiple) > token_budget
    kept, dropped = np.flatnonzero(~too_long), np.flatnonzero(too_long)
    if len(dropped) and oversize == "refuse":
        padding = f" (padded to a multiple of {multiple})" if multiple > 1 else ""
        count = "1 sequence does" if len(dropped) == 1 else f"{len(dropped)} sequences do"
        what = f"{count} not fit into a microbatch of packing.token_budget = {token_budget} tokens{padding}"
        longest = int(round_up(counts, multiple).max())
        remedy = f"et packing.token_budget to at least {longest}, or packing.oversize=drop to leave them out"
        if names is None:
            raise DataError(f"{what}, the longest has {counts.max()}: s{remedy}")
        lines = [f"{what}:"]
        lines += [f"  - sequence {names[index]}: {counts[index]} tokens" for index in dropped[:_NAMED].tolist()]
        if len(dropped) > _NAMED:
            lines.append(f"  ... and {len(dropped) - _NAMED} more")
        raise DataError("\n".join([*lines, f"S{remedy}."]))
    return kept, dropped


def require_some(
    kept: IntArray, lengths: Sequence[int] | NDArray[np.integer], *, token_budget: int, multiple: int = 1
) -> None:
    """Refuse conversations of which none is left.

    Args:
        kept: what `fitting_sequences` found to fit.
        lengths, token_budget, multiple: as it was given them; at least one length.

    Raises:
        DataError: nothing is kept; names the budget and the shortest conversation's tokens, padding included.
    """
    if not len(kept):
        shortest = int(round_up(np.asarray(lengths, dtype=np.int64), multiple).min())
        padding = f" (padded to a multiple of {multiple})" if multiple > 1 else ""
        raise DataError(
            f"data.sft: all {len(lengths)} conversations are over packing.token_budget = {token_budget} tokens and "
            f"were dropped (packing.oversize=drop); the shortest has {shortest}{padding}: raise "
            "packing.token_budget to at least the longest that is to be trained on"
        )
