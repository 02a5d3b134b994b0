"""The rollout ledger: one SQLite file per run that says of every prompt how far it has come.

A group moves along `reserved -> generated -> graded -> committed -> trained`, one transaction per move, keyed by
(epoch, prompt_id). What a kill leaves behind and what a checkpoint of another age makes of it is in `resuming.py`.
"""

from __future__ import annotations

from megatron_klear.rollout.ledger.entries import EVENTS, STATES, GroupState, StoredGroup
from megatron_klear.rollout.ledger.filter import GroupFilter
from megatron_klear.rollout.ledger.reading import LedgerReader, ResponseRow
from megatron_klear.rollout.ledger.replay import replay_step, require_steps, scored_group, with_names_of_their_own
from megatron_klear.rollout.ledger.resuming import (
    ROLLOUT_ONLY,
    LedgerPosition,
    Reconciled,
    open_groups,
    position,
    reconcile,
)
from megatron_klear.rollout.ledger.terms import OPENING, Terms, UnderOtherTerms, check_replay
from megatron_klear.rollout.ledger.writing import Ledger

LEDGER_FILE = "ledger.sqlite"
"""Name of the ledger below `run.dir`."""

__all__ = [
    "EVENTS",
    "LEDGER_FILE",
    "OPENING",
    "ROLLOUT_ONLY",
    "STATES",
    "GroupFilter",
    "GroupState",
    "Ledger",
    "LedgerPosition",
    "LedgerReader",
    "Reconciled",
    "ResponseRow",
    "StoredGroup",
    "Terms",
    "UnderOtherTerms",
    "check_replay",
    "open_groups",
    "position",
    "reconcile",
    "replay_step",
    "require_steps",
    "scored_group",
    "with_names_of_their_own",
]
