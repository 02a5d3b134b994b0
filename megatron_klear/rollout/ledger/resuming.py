"""What a checkpoint stores of the ledger, and how both are brought together again after a kill.

The checkpoint decides what the weights have learned; the ledger decides what each group is. A step runs
`take (committed) -> update -> trained -> publish -> checkpoint`, and the kill may come between any two:

- before `committed`: the groups are graded or earlier and go on from there.
- before `trained`, or after it and before the checkpoint: the weights that learned from the step are gone. Its groups
  go back to `committed` and the step is trained again with the same groups in the same order. Groups of steps after
  that one are free for any step again.
- after the checkpoint: the step stays trained; if the ledger had missed that, the checkpoint's word counts.

In all of these, tokens sampled from versions above the checkpoint's step came from weights that will never have
existed. They are cut off; what is left of a response is continued. So every prompt is trained exactly once in the
history that counts, the one the checkpoint continues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_klear.errors import CheckpointError
from megatron_klear.records import Prompt
from megatron_klear.rollout.ledger.entries import cut_to_version
from megatron_klear.rollout.ledger.terms import Terms, UnderOtherTerms, enforce
from megatron_klear.rollout.ledger.writing import Ledger

ROLLOUT_ONLY = "rollout_only"
"""Name of the fact whether all responses were drawn from the run's first weights, whatever version they name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerPosition:
    """The ledger's place in a checkpoint; plain JSON types through `to_json`.

    Attributes:
        ledger_id: which ledger.
        step: the checkpoint's step.
        last_group: newest group id reserved then.
        in_flight: (group id, epoch, prompt_id) of the groups not yet trained then, at most what staleness allows.
    """

    ledger_id: str
    step: int
    last_group: int
    in_flight: tuple[tuple[int, int, str], ...]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self), "in_flight": [list(entry) for entry in self.in_flight]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From a checkpoint."""
        return cls(
            ledger_id=str(value["ledger_id"]),
            step=int(value["step"]),
            last_group=int(value["last_group"]),
            in_flight=tuple((int(g), int(e), str(p)) for g, e, p in value["in_flight"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What `reconcile` found and did, in numbers of groups.

    Attributes:
        continuing: not trained; go on where they are.
        rolled_back: trained after the checkpoint, to be trained again.
        cut_back: lost responses, or parts of some, to versions that are gone.
        restored: in flight at the checkpoint and missing from the ledger; reserved again.
        confirmed: trained by the checkpoint's word.
        other_terms: had responses or grades of other settings.
    """

    continuing: int
    rolled_back: int
    cut_back: int
    restored: int
    confirmed: int
    other_terms: UnderOtherTerms


def position(ledger: Ledger, step: int) -> LedgerPosition:
    """What the checkpoint of a step has to store; call it after `trained(step)`."""
    with ledger.transaction() as db:
        last = db.execute("SELECT COALESCE(MAX(group_id), 0) FROM groups").fetchone()[0]
        return LedgerPosition(
            ledger_id=ledger.ledger_id, step=step, last_group=last, in_flight=tuple(open_groups(ledger))
        )


def open_groups(ledger: Ledger) -> list[tuple[int, int, str]]:
    """(group id, epoch, prompt_id) of the groups that are not trained, in the order of the walk."""
    with ledger.transaction() as db:
        return db.execute(
            "SELECT group_id, epoch, prompt_id FROM groups WHERE state != 'trained' ORDER BY group_id"
        ).fetchall()


def reconcile(
    ledger: Ledger,
    step: int,
    stored: LedgerPosition | None,
    *,
    identity: str,
    prompts: Mapping[str, Prompt],
    num_responses: int,
    terms: Terms,
    keep_next_step: bool = True,
    rollout_only: bool = False,
) -> Reconciled:
    """Make the ledger agree with the checkpoint and the settings that a run goes on from, in one transaction.

    Args:
        ledger: of this run; empty where the run is new or its ledger was lost.
        step: steps that the weights have learned from; 0 for a run that starts from its first weights.
        stored: the checkpoint's position; None when it has none.
        identity: of everything that version 0 depends on (data, model, first weights); without a checkpoint, groups
            are kept only when it is unchanged.
        prompts: by id, to reserve again what a lost ledger held.
        num_responses: M, also of groups that were reserved with another and are not trained.
        terms: settings that responses and grades must be of, see `terms.py`.
        keep_next_step: whether the groups of the step after `step` stay promised to it; false where the order of the
            data says anew which they are.
        rollout_only: steps up to `step` are recorded and not trained; the ledger is all that is left of them.

    Raises:
        CheckpointError: the ledger is of another run, prompts in flight are no longer in the data, or steps that are
            in the ledger alone are not there.
    """
    with ledger.transaction() as db:
        if rollout_only:
            _require_recorded(ledger, step)
        ledger.set_fact(ROLLOUT_ONLY, json.dumps(rollout_only))
        if stored is None and step == 0 and ledger.fact("identity") not in (None, identity):
            for table in ("tokens", "responses", "groups", "prompts"):
                db.execute(f"DELETE FROM {table}")
            ledger.note("emptied", [None], detail="no checkpoint, and the run starts from other weights or data")
        if step == 0 or ledger.fact("identity") is None:  # later the first weights may be others, unread
            ledger.set_fact("identity", identity)
        ledger.note("resumed", [None], step=step)
        restored = confirmed = 0
        if stored is not None:
            restored = _restore(ledger, stored, prompts, num_responses)
            confirmed = _confirm(ledger, stored)
        rolled_back = _roll_back(ledger, step, step + 1 if keep_next_step else step)
        other_terms = enforce(ledger, terms, step=step, num_responses=num_responses)
        cut = _cut_back(ledger, step)
        return Reconciled(
            continuing=len(ledger.unfinished()),
            rolled_back=rolled_back,
            cut_back=cut,
            restored=restored,
            confirmed=confirmed,
            other_terms=other_terms,
        )


def _require_recorded(ledger: Ledger, step: int) -> None:
    """Refuse a ledger that has not got all steps that were recorded: nothing would draw those again."""
    with ledger.transaction() as db:
        known = {row[0] for row in db.execute("SELECT DISTINCT step FROM groups WHERE step <= ?", [step]).fetchall()}
    missing = [number for number in range(1, step + 1) if number not in known]
    if missing:
        raise CheckpointError(
            f"{ledger.file} lacks {len(missing)} of the {step} steps that were recorded up to the newest checkpoint "
            f"(scheduling.rollout_only), the first of them step {missing[0]}; put back the ledger that they were "
            "recorded in, or record anew in another run.dir"
        )


def _restore(ledger: Ledger, stored: LedgerPosition, prompts: Mapping[str, Prompt], num_responses: int) -> int:
    """Reserve again what was in flight and is missing, in a new ledger or an older copy; refuse that of another run."""
    if ledger.ledger_id != stored.ledger_id and ledger.states():
        raise CheckpointError(
            f"{ledger.file} is not the ledger that the newest checkpoint was written with; put that one back, or move "
            "this one aside to go on without the responses in flight"
        )
    with ledger.transaction() as db:
        missing = []
        for group_id, epoch, prompt_id in stored.in_flight:
            entered = db.execute(
                "SELECT group_id, epoch, prompt_id FROM groups WHERE group_id = ? OR (epoch = ? AND prompt_id = ?)",
                [group_id, epoch, prompt_id],
            ).fetchall()
            if not entered:
                missing.append((group_id, epoch, prompt_id))
            elif entered != [(group_id, epoch, prompt_id)]:
                raise CheckpointError(
                    f"{ledger.file} contradicts the newest checkpoint: there group {group_id} is prompt {prompt_id} of "
                    f"epoch {epoch}, here it is not; put back the ledger that the checkpoint was written with, or move "
                    "this one aside to go on without the responses in flight"
                )
        gone = [prompt_id for _, _, prompt_id in missing if prompt_id not in prompts]
        if gone:
            raise CheckpointError(
                f"{len(gone)} prompts that were in flight are no longer in data.prompts: {', '.join(gone[:8])}; put "
                "them back, or start in another run.dir"
            )
        ledger.set_fact("ledger_id", stored.ledger_id)
        last = max(_last_number(db), stored.last_group)
        for group_id, epoch, prompt_id in missing:
            [entered_as] = ledger.reserve([(epoch, prompts[prompt_id])], num_responses=num_responses)
            # Order and seeds of the walk stay what they were.
            db.execute("UPDATE groups SET group_id = ? WHERE group_id = ?", [group_id, entered_as])
        # No number is given out twice: ids go on where the ledger of the checkpoint had come to.
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'groups'")
        db.execute("INSERT INTO sqlite_sequence VALUES ('groups', ?)", [last])
        if missing:
            ledger.note("restored", [entry[0] for entry in missing], step=stored.step)
    return len(missing)


def _last_number(db: Any) -> int:
    """The newest group id ever given out."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'groups'").fetchone()
    return 0 if row is None else int(row[0])


def _confirm(ledger: Ledger, stored: LedgerPosition) -> int:
    """Take the checkpoint's word for groups that it was trained on and that the ledger has as untrained."""
    in_flight = {entry[0] for entry in stored.in_flight}
    known = [i for i in ledger.unfinished() if i <= stored.last_group and i not in in_flight]
    with ledger.transaction() as db:
        for group_id in known:
            db.execute(
                "UPDATE groups SET state = 'trained', step = COALESCE(step, ?), place = COALESCE(place, 0) "
                "WHERE group_id = ?", (stored.step, group_id),
            )  # fmt: skip
        ledger.note("trained", known, step=stored.step, detail="by the word of the checkpoint")
    return len(known)


def _roll_back(ledger: Ledger, step: int, last_promise: int) -> int:
    """Untrain what was trained after the checkpoint; groups of steps above `last_promise` are free for any again."""
    with ledger.transaction() as db:
        ids = [
            row[0]
            for row in db.execute("SELECT group_id FROM groups WHERE state = 'trained' AND step > ?", [step]).fetchall()
        ]
        db.executemany("UPDATE groups SET state = 'committed' WHERE group_id = ?", [(i,) for i in ids])
        ledger.note("rolled back", ids, detail=f"resumed from step {step}")
        db.execute(
            "UPDATE groups SET state = 'graded', step = NULL, place = NULL WHERE state = 'committed' AND step > ?",
            [last_promise],
        )
    return len(ids)


def _cut_back(ledger: Ledger, step: int) -> int:
    """Take out tokens of versions above `step`; groups that lost some, or whose tokens were removed, are reserved."""
    with ledger.transaction() as db:
        ids = [
            row[0]
            for row in db.execute(
                "SELECT group_id FROM groups g WHERE state != 'trained' AND ("
                "EXISTS (SELECT 1 FROM responses r WHERE r.group_id = g.group_id AND r.newest_version > ?) OR "
                "state != 'reserved' AND num_responses > (SELECT COUNT(*) FROM tokens t WHERE t.group_id = g.group_id))"
                "ORDER BY group_id", [step],
            ).fetchall()
        ]  # fmt: skip
        for group_id in ids:  # one at a time: their tokens may be many
            group = ledger.load([group_id])[0]
            kept = {index: cut_to_version(rollout, step) for index, rollout in group.rollouts.items()}
            heads = {index: rollout for index, rollout in kept.items() if rollout is not None}
            ledger.replace_responses(group_id, heads, why=f"sampled after step {step}, or removed to save space")
    return len(ids)
