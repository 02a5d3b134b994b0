"""Which groups make a step, against a search over all choices."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from megatron_klear.records import Prompt
from megatron_klear.rollout.manager.order import completion_batch, fixed_batch, started_limit
from megatron_klear.rollout.manager.work import GroupWork


def group(number: int, version: int | None, rank: int | None, step: int | None = None) -> GroupWork:
    prompt = Prompt(prompt_id=f"p{number}", domain="math", token_ids=np.array([1]), reference="")
    return GroupWork(group_id=number, epoch=0, prompt=prompt, oldest_version=version, is_graded=rank is not None,
                     ready_rank=rank or 0, step=step)  # fmt: skip


def can_all_be_in_time(groups, next_step, count, staleness):
    """Earliest deadline first, one step after the other."""
    due = sorted(g.oldest_version + 1 + staleness for g in groups if g.oldest_version is not None)
    return all(next_step + place // count <= deadline for place, deadline in enumerate(due))


def search_agrees(seed: int) -> str:
    """Compare one random case with all choices that there are; says how it came out."""
    rng = random.Random(seed)
    staleness, count, step = rng.randint(0, 3), rng.randint(1, 3), rng.randint(1, 6)
    ranks = rng.sample(range(100), 9)
    groups = [
        group(
            i, rng.choice([None, *range(max(0, step - 1 - staleness), step)]), ranks[i] if rng.random() < 0.7 else None
        )
        for i in range(rng.randint(count, 9))
    ]
    for g in groups:
        g.is_graded = g.is_graded and g.oldest_version is not None  # what was not started is not ready
    if not can_all_be_in_time(groups, step, count, staleness):
        return "impossible from the start"
    found = completion_batch(groups, step, count, staleness=staleness)
    ready = [g for g in groups if g.is_graded]
    possible = [
        chosen
        for chosen in combinations(ready, count)
        if can_all_be_in_time([g for g in groups if g not in chosen], step + 1, count, staleness)
    ]
    if found is None:
        assert not possible, "it waits though it need not"
        return "waits"
    assert len(found) == len(set(map(id, found))) == count
    assert set(map(id, found)) in [set(map(id, chosen)) for chosen in possible]
    urgent = {g.group_id for g in groups if g.oldest_version is not None and g.oldest_version + 1 + staleness == step}
    assert urgent <= {g.group_id for g in found}
    return "taken"


def test_completion_takes_groups_that_leave_the_others_time_and_waits_only_where_it_must():
    outcomes = [search_agrees(seed) for seed in range(600)]
    assert outcomes.count("taken") > 100
    assert outcomes.count("waits") > 50


def test_fixed_waits_for_the_next_in_the_walk():
    groups = [group(1, 0, 5), group(2, 0, None), group(3, 0, 1), group(4, 0, 2)]
    assert fixed_batch(groups, 1, 2) is None
    groups[1].is_graded = True
    assert [g.group_id for g in fixed_batch(groups, 1, 2)] == [1, 2]


@pytest.mark.parametrize("choose", [fixed_batch, lambda g, s, c: completion_batch(g, s, c, staleness=2)])
def test_groups_of_other_steps_are_left_and_those_of_this_one_taken(choose):
    groups = [group(1, 0, 0, step=7), group(2, 0, 1), group(3, 0, 2, step=2), group(4, 0, 3)]
    assert {g.group_id for g in choose(groups, 2, 2)} == {2, 3}


@pytest.mark.parametrize(
    ("version", "next_step", "staleness", "steps"),
    [(0, 1, 0, 1), (0, 2, 0, 0), (1, 2, 0, 1), (0, 1, 1, 2), (0, 2, 1, 1), (3, 4, 4, 5), (3, 5, 4, 4), (0, 9, 1, 0)],
)
def test_as_many_steps_may_be_started_as_can_be_trained_in_time(version, next_step, staleness, steps):
    limit = started_limit(version=version, next_step=next_step, staleness=staleness, per_step=3)
    assert limit == 3 * steps
    # By hand: the last of them is trained in that step, by weights one version below it.
    if steps:
        assert (next_step + steps - 1) - 1 - version <= staleness
    assert (next_step + steps) - 1 - version > staleness or steps == 0
