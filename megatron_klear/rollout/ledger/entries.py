"""What the ledger holds, as records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from megatron_klear.records import Grade, Prompt, Rollout, RolloutGroup

GroupState = Literal["reserved", "generated", "graded", "committed", "trained"]
STATES: tuple[GroupState, ...] = get_args(GroupState)
"""In the order a group passes through them."""

EventName = Literal["trained", "rolled back", "drawn again", "graded again", "restored", "resumed", "emptied"]
EVENTS: tuple[EventName, ...] = get_args(EventName)
"""What the history tells of; `resumed` and `emptied` are of the whole ledger, the others of groups."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """One prompt group as the ledger has it.

    Attributes:
        group_id: counts the groups of the run in the order of the walk over the data, from 1.
        epoch: pass over the data; (epoch, prompt_id) is the key.
        state: how far it has come.
        step: the step it is committed to or was trained in; None before.
        place: its place in that step.
        num_responses: M, how many responses it needs.
        draws: how often responses of it were thrown away and drawn again.
        rollouts: by response index; one with finish reason `abort` is unfinished and to be continued.
        grades: by response index; all or none.
    """

    group_id: int
    epoch: int
    prompt: Prompt
    state: GroupState
    step: int | None
    place: int | None
    num_responses: int
    draws: int
    rollouts: dict[int, Rollout]
    grades: dict[int, Grade]

    @property
    def is_complete(self) -> bool:
        """Whether every response is finished."""
        return len(self.rollouts) == self.num_responses and all(
            r.finish_reason != "abort" for r in self.rollouts.values()
        )

    @property
    def oldest_version(self) -> int | None:
        """The oldest version that any of its tokens was sampled from; None without tokens."""
        return min((v for r in self.rollouts.values() for v, _ in r.policy_versions), default=None)

    def rollout_group(self) -> RolloutGroup:
        """The group as the trainer takes it; only for complete groups."""
        return RolloutGroup(prompt=self.prompt, rollouts=tuple(self.rollouts[i] for i in range(self.num_responses)))


def cut_to_version(rollout: Rollout, newest: int) -> Rollout | None:
    """The head of a response that was sampled from versions up to `newest`; None when that is nothing.

    Versions never go down within a response, so what is left is a prefix, which can be continued.

    Args:
        rollout: finished or not.
        newest: newest version whose weights are part of the run's history.
    """
    kept = 0
    runs: list[tuple[int, int]] = []
    for version, count in rollout.policy_versions:
        if version > newest:
            break
        runs.append((version, count))
        kept += count
    if kept == len(rollout.response_ids):
        return rollout
    if kept == 0:
        return None
    return replace(
        rollout,
        response_ids=np.ascontiguousarray(rollout.response_ids[:kept]),
        rollout_logprobs=np.ascontiguousarray(rollout.rollout_logprobs[:kept]),
        finish_reason="abort",
        policy_versions=tuple(runs),
    )


def join_versions(*parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Put (version, tokens) runs one after the other, neighbours of the same version in one."""
    joined: list[tuple[int, int]] = []
    for version, count in (run for part in parts for run in part):
        if count == 0:
            continue
        if joined and joined[-1][0] == version:
            joined[-1] = (version, joined[-1][1] + count)
        else:
            joined.append((version, count))
    return tuple(joined)
