"""Reading whole groups out of a ledger's tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_klear.records import Grade, Prompt, Rollout
from megatron_klear.rollout.ledger.encoding import unpack_logprobs, unpack_tokens, unpack_versions
from megatron_klear.rollout.ledger.entries import StoredGroup

_AT_A_TIME = 16

_GROUPS = """
SELECT g.group_id, g.epoch, g.state, g.step, g.place, g.num_responses, g.draws,
       p.prompt_id, p.domain, p.reference, p.text, p.token_ids
FROM groups g JOIN prompts p USING (prompt_id)
WHERE g.group_id IN ({marks})
"""
_RESPONSES = """
SELECT r.group_id, r.response_index, r.finish_reason, r.versions, r.outcome, r.reward, r.reason, t.token_ids, t.logprobs
FROM responses r JOIN tokens t USING (group_id, response_index)
WHERE r.group_id IN ({marks})
"""


def load_groups(connection: sqlite3.Connection, group_ids: Iterable[int]) -> Iterator[StoredGroup]:
    """Yield groups in the order asked for, a few in memory at a time.

    Responses whose tokens were removed to save space are left out, so such a group is incomplete.

    Args:
        connection: reader's or writer's.
        group_ids: which; unknown ones are left out.
    """
    wanted = list(group_ids)
    for start in range(0, len(wanted), _AT_A_TIME):
        chunk = wanted[start : start + _AT_A_TIME]
        marks = ",".join("?" * len(chunk))
        rollouts: dict[int, dict[int, Rollout]] = {}
        grades: dict[int, dict[int, Grade]] = {}
        for row in connection.execute(_RESPONSES.format(marks=marks), chunk):
            group_id, index, finish, versions, outcome, reward, reason, tokens, logprobs = row
            rollouts.setdefault(group_id, {})[index] = Rollout(
                response_ids=unpack_tokens(tokens),
                rollout_logprobs=unpack_logprobs(logprobs),
                finish_reason=finish,
                policy_versions=unpack_versions(versions),
            )
            if outcome is not None:
                grades.setdefault(group_id, {})[index] = Grade(outcome=outcome, reward=reward, reason=reason)
        found = {row[0]: row for row in connection.execute(_GROUPS.format(marks=marks), chunk)}
        for group_id in chunk:
            if group_id in found:
                yield _group(found[group_id], rollouts.get(group_id, {}), grades.get(group_id, {}))


def _group(row: tuple[Any, ...], rollouts: dict[int, Rollout], grades: dict[int, Grade]) -> StoredGroup:
    group_id, epoch, state, step, place, num_responses, draws, prompt_id, domain, reference, text, token_ids = row
    return StoredGroup(
        group_id=group_id,
        epoch=epoch,
        prompt=Prompt(
            prompt_id=prompt_id, domain=domain, token_ids=unpack_tokens(token_ids), reference=reference, text=text
        ),
        state=state,
        step=step,
        place=place,
        num_responses=num_responses,
        draws=draws,
        rollouts=rollouts,
        grades=grades,
    )
