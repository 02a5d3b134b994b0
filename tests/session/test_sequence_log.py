"""The log of trained sequences is of what was trained, and stands for what a resume takes as trained."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_klear.data import StepPlan
from megatron_klear.errors import TrainingError
from megatron_klear.session.sft_rows import SequenceLog


def plan(rows: list[int], epochs: list[int]) -> StepPlan:
    return StepPlan(rows=np.array(rows, dtype=np.int64), epochs=np.array(epochs, dtype=np.int64))


@pytest.mark.parametrize("trained", [([1, 2, 4], [0, 0, 0]), ([1, 2, 3], [0, 0, 1]), ([1, 2], [0, 0])])
def test_a_loader_out_of_step_with_the_walk_ends_the_run(trained: tuple[list[int], list[int]]) -> None:
    log = SequenceLog.__new__(SequenceLog)
    log._file = None  # as on a rank that writes none
    walk = plan([1, 2, 3], [0, 0, 0])
    log.note(7, walk, trained=plan([1, 2, 3], [0, 0, 0]))
    with pytest.raises(TrainingError, match="step 7 was trained on other sequences"):
        log.note(7, walk, trained=plan(*trained))
