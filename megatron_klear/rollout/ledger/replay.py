"""A step's groups out of a ledger, ready to train on: training without engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_klear.errors import RolloutError
from megatron_klear.records import Grade, RolloutGroup, ScoredGroup
from megatron_klear.rollout.ledger.entries import StoredGroup
from megatron_klear.rollout.ledger.reading import LedgerReader


def scored_group(group: RolloutGroup, grades: tuple[Grade, ...], *, normalize_std: bool) -> ScoredGroup:
    """A graded group with its advantages.

    Equation: Eq. 4.

    Args:
        group: the responses [M].
        grades: one per response [M].
        normalize_std: divide by the standard deviation of the rewards (algorithm.advantage_std).
    """
    import torch  # here: reading a ledger must not cost its seconds

    from megatron_klear.algorithm import group_advantages

    rewards = np.array([g.reward for g in grades], dtype=np.float32)
    graded = np.array([g.outcome != "ungraded" for g in grades], dtype=np.bool_)
    advantages = group_advantages(
        torch.from_numpy(rewards).double(), torch.from_numpy(graded), normalize_std=normalize_std
    )
    return ScoredGroup(
        group=group,
        grades=grades,
        rewards=rewards,
        is_correct=np.array([g.outcome == "correct" for g in grades], dtype=np.bool_),
        graded=graded,
        advantages=advantages.numpy().astype(np.float32),
    )


def replay_step(
    reader: LedgerReader, step: int, *, normalize_std: bool, version: int | None = None
) -> list[ScoredGroup]:
    """The groups that a step of a run was trained on, in its order.

    Args:
        reader: of the run's ledger.
        step: counted from 1.
        normalize_std: see `scored_group`.
        version: that all tokens are said to be of; None leaves those that the ledger says.

    Raises:
        RolloutError: the ledger has no such step, or its tokens were removed to save space.
    """
    groups = reader.groups_of_step(step)
    if not groups:
        require_steps(reader, step, step)
    scored = [_scored(reader, group, normalize_std) for group in with_names_of_their_own(groups)]
    return scored if version is None else [_as_of(version, group) for group in scored]


def require_steps(reader: LedgerReader, first: int, last: int) -> None:
    """Check that a ledger holds all the steps of a replay.

    Args:
        reader: of the run's ledger.
        first, last: steps, counted from 1.

    Raises:
        RolloutError: a step is missing.
    """
    known = reader.steps()
    missing = sorted(set(range(first, last + 1)).difference(known))
    if missing:
        text = f"it holds steps {known[0]} to {known[-1]}" if known else "it holds no finished step"
        raise RolloutError(
            f"{reader.file}: no groups of step {missing[0]} to replay; {text}: choose with "
            "scheduling.replay_first_step and scheduling.replay_last_step"
        )


def with_names_of_their_own(groups: Sequence[StoredGroup]) -> list[StoredGroup]:
    """The groups of a step, a prompt that it holds twice under another id the second time: its own and the epoch.

    With `scheduling.order` completion a step may take a prompt's last group of one epoch and its first of the next, and
    the trainer knows sequences by the prompt's id.
    """
    seen: set[str] = set()
    named = []
    for group in groups:
        prompt_id = group.prompt.prompt_id
        if prompt_id in seen:
            group = replace(group, prompt=replace(group.prompt, prompt_id=f"{prompt_id} of epoch {group.epoch}"))
        seen.add(prompt_id)
        named.append(group)
    return named


def _as_of(version: int, scored: ScoredGroup) -> ScoredGroup:
    """The same responses, all tokens of one version."""
    rollouts = tuple(replace(r, policy_versions=((version, len(r.response_ids)),)) for r in scored.group.rollouts)
    return replace(scored, group=replace(scored.group, rollouts=rollouts))


def _scored(reader: LedgerReader, group: StoredGroup, normalize_std: bool) -> ScoredGroup:
    if not group.is_complete or len(group.grades) != group.num_responses:
        raise RolloutError(
            f"{reader.file}: the responses of prompt {group.prompt.prompt_id} in step {group.step} are no longer whole "
            "(scheduling.keep_steps removes tokens of old steps); replay a later step"
        )
    grades = tuple(group.grades[i] for i in range(group.num_responses))
    return scored_group(group.rollout_group(), grades, normalize_std=normalize_std)
