"""The one shift of the code base: from the token frame to the prediction frame and back.

Token frame: entry i speaks of token i. Prediction frame: entry t speaks of the token that position t predicts,
which is token t + 1. Records on the host are in the token frame, everything the model sees is in the other.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


def to_prediction_frame(values: NDArray[Scalar], last: float) -> NDArray[Scalar]:
    """Move every entry to the position that predicts it; entry 0, which nothing predicts, falls out.

    Args:
        values: [L], one entry per token, L at least 1.
        last: entry of the last position, which predicts nothing.

    Returns:
        [L], same dtype.
    """
    shifted = np.empty_like(values)
    shifted[:-1] = values[1:]
    shifted[-1] = last
    return shifted


def to_token_frame(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """Move every entry to the token that it speaks of; entry 0 becomes 0 and the last position's entry falls out.

    Args:
        values: [L], one entry per predicting position, L at least 1.

    Returns:
        [L], same dtype.
    """
    shifted = np.empty_like(values)
    shifted[1:] = values[:-1]
    shifted[0] = 0
    return shifted
