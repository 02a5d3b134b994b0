"""A few responses of the groups that a step does not train on, so that engine and trainer are compared on them, too.

The filter leaves out groups whose responses are all wrong, and an engine that draws garbage makes no others: what is
trained on would never show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_klear.records import ScoredGroup

MOST_RESPONSES = 8
"""Responses compared in a step, each of another group: well under 1% of the scoring of a step of the paper's size."""


def left_out_sample(groups: Sequence[ScoredGroup], kept: Sequence[ScoredGroup], *, step: int) -> list[ScoredGroup]:
    """One response each of some groups that are not trained on, at most `MOST_RESPONSES`, the same on every rank.

    Groups are taken evenly over the batch, and the number of the response goes on with the step. They count as graded,
    whatever the graders said of them: their grades are not looked at.

    Args:
        groups: the whole batch of the step.
        kept: those that are trained on, of `groups`.
        step: to train.
    """
    trained = {id(group) for group in kept}
    others = [group for group in groups if id(group) not in trained]
    count = min(MOST_RESPONSES, len(others))
    chosen = [others[i] for i in np.arange(count) * len(others) // max(count, 1)]
    found = [_only(group, step % len(group.group.rollouts)) for group in chosen]
    return [group for group in found if len(group.group.rollouts[0].response_ids)]


def _only(group: ScoredGroup, response: int) -> ScoredGroup:
    one = slice(response, response + 1)
    return ScoredGroup(
        group=replace(group.group, rollouts=group.group.rollouts[one]),
        grades=group.grades[one],
        rewards=group.rewards[one],
        is_correct=group.is_correct[one],
        graded=np.ones(1, dtype=np.bool_),
        advantages=group.advantages[one],
    )
