"""What a step showed of engine and trainer under the same weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    """Engine and trainer compute alike: tokens of the published version were within `correction`'s limits.

    Attributes:
        step: of which it was seen.
        tokens: that show it.
        mean_abs: mean |difference| of their log-probabilities, nats.
    """

    step: int
    tokens: int
    mean_abs: float
