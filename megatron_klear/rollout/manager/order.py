"""Which groups a step is trained on, such that none of those left behind can become too old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_klear.rollout.manager.work import GroupWork


def started_limit(*, version: int, next_step: int, staleness: int, per_step: int) -> int:
    """How many untrained groups may have been started while the engines hold `version`.

    Group i of those (from 0) is trained in step `next_step + i // per_step` at the latest, by weights of the version
    one below that step; it may be sampled from now if that is at most `staleness` above `version`.

    Args:
        version: of the engines' weights.
        next_step: first step not trained yet.
        staleness: most versions between sampling and training; 0 is on-policy.
        per_step: groups of a step.
    """
    return max(0, version - next_step + 2 + staleness) * per_step


def fixed_batch(groups: Sequence[GroupWork], step: int, count: int) -> list[GroupWork] | None:
    """The next groups in the order of the walk over the data; None until all of them are graded.

    Args:
        groups: all untrained ones, in the order of the walk.
        step: to fill.
        count: groups that it takes.
    """
    batch = [g for g in groups if g.step == step]
    batch += [g for g in groups if g.step is None][: max(0, count - len(batch))]
    batch.sort(key=lambda group: group.group_id)
    return batch if len(batch) >= count and all(g.is_graded for g in batch) else None


def completion_batch(groups: Sequence[GroupWork], step: int, count: int, *, staleness: int) -> list[GroupWork] | None:
    """The groups that were graded first, as far as the others can wait; None until there are enough.

    A group whose oldest token is of version v must be trained in step v + 1 + staleness at the latest. For every such
    deadline d, the groups due by then must fit into the steps up to d, so this step takes what would not fit into the
    others: earliest deadlines first, and waits for them where it must. That is why nothing has to be thrown away.

    Args:
        groups: all untrained ones.
        step: to fill.
        count: groups that it takes.
        staleness: most versions between sampling and training.
    """
    batch = [g for g in groups if g.step == step]
    free = [g for g in groups if g.step is None]
    ready = sorted((g for g in free if g.is_graded), key=lambda group: group.ready_rank)
    due = Counter(g.oldest_version + 1 + staleness for g in free if g.oldest_version is not None)
    due_by = taken = 0
    for deadline in sorted(due):
        due_by += due[deadline]
        # Of the groups due by `deadline`, those that the steps after this one cannot hold.
        missing = due_by - max(0, deadline - step) * count - taken
        missing = min(missing, count - len(batch))
        if missing <= 0:
            continue
        able = [g for g in ready if g.oldest_version is not None and g.oldest_version + 1 + staleness <= deadline]
        if len(able) < missing:
            return None
        batch += able[:missing]
        taken += missing
        chosen = {g.group_id for g in able[:missing]}
        ready = [g for g in ready if g.group_id not in chosen]
    batch += ready[: max(0, count - len(batch))]
    return batch if len(batch) >= count else None
