"""Denominators: what one token of a response weighs in the training loss (Eqs. 3, 6, 7, 8, 11, 13).

The training loss is the plain sum over tokens, microbatches and ranks of weight times token loss. So these
functions take the trained-token counts of the *whole* minibatch, of all ranks, and run on the host before the
forward pass. Everything is float64 here; `masked_token_weights` makes the float32 arrays of a training record.

One rule throughout: a count of 0 means that the response is not part of the objective (ungraded, dropped, or
empty). It weighs nothing, and enters no sum of lengths, no number of responses and no number of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PolicyNormalizer = Literal["group", "sequence", "batch"]
SftNormalizer = Literal["sequence", "token"]

Weights = NDArray[np.float64]
Counts = Sequence[int] | NDArray[np.integer]


def _checked(token_counts: Sequence[Counts]) -> list[Weights]:
    """Turn counts into float64 arrays, one per group.

    Raises:
        ValueError: a group is not one-dimensional, or holds a negative or fractional count.
    """
    groups = []
    for index, counts in enumerate(token_counts):
        group = np.asarray(counts, dtype=np.float64)
        if group.ndim != 1 or not np.all(np.isfinite(group)) or np.any(group < 0) or np.any(group % 1 != 0):
            raise ValueError(f"group {index}: token counts must be whole numbers of at least 0, got {counts!r}")
        groups.append(group)
    return groups


def _inverse(denominator: float) -> float:
    """Return 1 / denominator, or 0 where nothing is counted."""
    return 1.0 / denominator if denominator > 0 else 0.0


def group_token_weights(token_counts: Sequence[Counts]) -> list[Weights]:
    """Weigh tokens equally within a prompt's group, and groups equally: 1 / (G sum_j T_j).

    Equation: Eqs. 7, 11, 15, 17, the expectation over prompts being the mean over the G groups of a minibatch.

    Args:
        token_counts: per group, the trained tokens T_j of each response; a whole minibatch, all ranks.

    Returns:
        Per group float64 [M], the weight of each of that response's tokens.

    Raises:
        ValueError: a count is negative or not a whole number.
    """
    groups = _checked(token_counts)
    num_groups = sum(bool(group.sum() > 0) for group in groups)
    return [np.where(group > 0, _inverse(num_groups * float(group.sum())), 0.0) for group in groups]


def sequence_token_weights(token_counts: Sequence[Counts]) -> list[Weights]:
    """Weigh responses equally within a group, and groups equally: 1 / (G M T_j).

    Equation: Eqs. 3 and 6.

    Args:
        token_counts: per group, the trained tokens T_j of each response; a whole minibatch, all ranks.

    Returns:
        Per group float64 [M], the weight of each of that response's tokens.

    Raises:
        ValueError: a count is negative or not a whole number.
    """
    groups = _checked(token_counts)
    num_groups = sum(bool(group.sum() > 0) for group in groups)
    weights = []
    for group in groups:
        per_response = _inverse(num_groups * float(np.count_nonzero(group)))
        weights.append(np.where(group > 0, per_response / np.maximum(group, 1.0), 0.0))
    return weights


def batch_token_weights(token_counts: Sequence[Counts]) -> list[Weights]:
    """Weigh all tokens of the minibatch equally: 1 / sum of all T_j.

    Equation: Eq. 7 with the whole minibatch as one group.

    Args:
        token_counts: per group, the trained tokens T_j of each response; a whole minibatch, all ranks.

    Returns:
        Per group float64 [M], the weight of each of that response's tokens.

    Raises:
        ValueError: a count is negative or not a whole number.
    """
    groups = _checked(token_counts)
    weight = _inverse(sum(float(group.sum()) for group in groups))
    return [np.where(group > 0, weight, 0.0) for group in groups]


def policy_token_weights(token_counts: Sequence[Counts], normalizer: PolicyNormalizer) -> list[Weights]:
    """Weigh tokens by the named normalizer.

    Args:
        token_counts: per group, the trained tokens T_j of each response; a whole minibatch, all ranks.
        normalizer: `group` (Eqs. 7, 11), `sequence` (Eqs. 3, 6) or `batch`.

    Returns:
        Per group float64 [M], the weight of each of that response's tokens.

    Raises:
        ValueError: unknown normalizer, or a count that is negative or not a whole number.
    """
    builders = {"group": group_token_weights, "sequence": sequence_token_weights, "batch": batch_token_weights}
    if normalizer not in builders:
        raise ValueError(f"normalizer is {normalizer!r}, allowed are {', '.join(builders)}")
    return builders[normalizer](token_counts)


def lm_token_weights(
    token_counts: Sequence[Counts],
    is_correct: Sequence[Sequence[bool] | NDArray[np.bool_]],
    *,
    lm_loss_weight: float = 1.0,
) -> list[Weights]:
    """Weigh the tokens of correct responses equally over the minibatch: alpha / sum over Phi of T_j.

    Equation: Eq. 13 times the alpha of Eq. 14. Phi spans all groups, for Eq. 13 has no mean over prompts. No
    correct response at all gives zeros.

    Args:
        token_counts: per group, the trained tokens T_j of each response; a whole minibatch, all ranks.
        is_correct: per group bool [M], the positive mask Phi.
        lm_loss_weight: alpha.

    Returns:
        Per group float64 [M], the weight of each of that response's tokens.

    Raises:
        ValueError: a count is negative or not a whole number, or the two arguments do not match in shape.
    """
    groups = _checked(token_counts)
    masks = [np.asarray(mask, dtype=np.bool_) for mask in is_correct]
    if [group.shape for group in groups] != [mask.shape for mask in masks]:
        raise ValueError("is_correct must have one entry per response of token_counts, group by group")
    positive = [mask & (group > 0) for group, mask in zip(groups, masks, strict=True)]
    total = sum(float(group[mask].sum()) for group, mask in zip(groups, positive, strict=True))
    return [np.where(mask, lm_loss_weight * _inverse(total), 0.0) for mask in positive]


def sft_token_weights(token_counts: Counts, normalizer: SftNormalizer = "sequence") -> Weights:
    """Weigh the target tokens of an SFT batch.

    Equation: Eq. 8 for `sequence`: 1 / N, a sum over tokens and a mean over sequences, so that long answers
    weigh more. `token`: 1 / sum of all T_j.

    Args:
        token_counts: [N] target tokens of each sequence; a whole batch, all ranks.
        normalizer: `sequence` or `token`.

    Returns:
        float64 [N], the weight of each of that sequence's target tokens.

    Raises:
        ValueError: unknown normalizer, or a count that is negative or not a whole number.
    """
    (counts,) = _checked([token_counts])
    if normalizer not in ("sequence", "token"):
        raise ValueError(f"normalizer is {normalizer!r}, allowed are sequence, token")
    total = float(np.count_nonzero(counts)) if normalizer == "sequence" else float(counts.sum())
    return np.where(counts > 0, _inverse(total), 0.0)


def masked_token_weights(weight: float, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Spread a response's weight over its trained tokens.

    Args:
        weight: weight of one token, from a builder above.
        mask: bool [L], true for the tokens that are trained; its sum is the count given to the builder.

    Returns:
        float32 [L].
    """
    return np.where(mask, np.float32(weight), np.float32(0.0)).astype(np.float32)
