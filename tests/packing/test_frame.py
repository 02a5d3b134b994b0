"""The shift, against the definition written out by hand."""

from __future__ import annotations

import numpy as np

from megatron_klear.packing.frame import to_prediction_frame, to_token_frame


def test_every_position_gets_the_entry_of_the_token_that_it_predicts() -> None:
    values = np.array([5, 6, 7, 8], dtype=np.int64)
    shifted = to_prediction_frame(values, last=-100)
    assert shifted.tolist() == [6, 7, 8, -100]
    assert shifted.dtype == np.int64
    assert values.tolist() == [5, 6, 7, 8]


def test_the_way_back_is_the_inverse_but_for_entry_0() -> None:
    values = np.array([0, -1.5, -2.5, -3.5], dtype=np.float32)
    assert to_token_frame(to_prediction_frame(values, last=9)).tolist() == values.tolist()
    assert to_token_frame(values).dtype == np.float32


def test_a_single_token_predicts_nothing() -> None:
    assert to_prediction_frame(np.array([3]), last=-100).tolist() == [-100]
    assert to_token_frame(np.array([3.0])).tolist() == [0.0]
