"""What stored responses and grades depend on besides prompt and weights, and what becomes of them when it changes.

A ledger keeps the terms of its newest life as facts. When a run goes on under others, groups that are not trained yet
would mix both in one step: responses of another temperature, other stop tokens or another budget are drawn anew, and
where only the graders' terms differ, stored responses are graded anew. Steps that are done keep what they had, and the
ledger keeps which terms that was (`spans.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger.reading import LedgerReader
from megatron_klear.rollout.ledger.spans import begin_span, spans
from megatron_klear.rollout.ledger.writing import Ledger

DEFINING = ("rollout.temperature", "tokenizer.dir (content)")
"""Sampling settings without which recorded tokens and their log-probabilities say nothing."""
OPENING = "responses begin with"
"""Name, among the settings of grading, of what the chat template opens for every response; absent where it is nothing.

It is no token of a response, and part of the text that is graded."""
_UNKNOWN = "the ledger does not say under which settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Settings by dotted name, with values that JSON can hold.

    Attributes:
        sampling: what the distribution of a response depends on.
        grading: what else the grade of a given response depends on.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    grading: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderOtherTerms:
    """What `enforce` did.

    Attributes:
        redrawn: groups whose responses were thrown away.
        regraded: groups whose responses are kept and whose grades were thrown away.
        why: what differs, by dotted name with the old and the new value; empty when nothing was thrown away.
    """

    redrawn: int = 0
    regraded: int = 0
    why: str = ""


def enforce(ledger: Ledger, terms: Terms, *, step: int, num_responses: int) -> UnderOtherTerms:
    """Leave no response and no grade of other terms in groups of steps after `step`, and note these terms.

    Args:
        ledger: already agrees with the checkpoint about which groups are trained.
        terms: of the life of the run that begins.
        step: groups promised to steps up to this one (generated with no training) are done and keep what they have.
        num_responses: M; groups that were reserved with another are drawn anew with this one.
    """
    with ledger.transaction() as db:
        other = _differences(ledger.fact("sampling"), terms.sampling, "its responses were drawn")
        regrade = _differences(ledger.fact("grading"), terms.grading, "its responses were graded")
        open_groups = "state != 'trained' AND (step IS NULL OR step > ?)"
        holding = f"{open_groups} AND EXISTS (SELECT 1 FROM responses r WHERE r.group_id = groups.group_id)"
        redrawn = [
            row[0]
            for row in db.execute(
                f"SELECT group_id FROM groups WHERE {holding} AND (? OR num_responses != ?) ORDER BY group_id",
                [step, bool(other), num_responses],
            ).fetchall()
        ]
        why = other or f"rollout.responses_per_prompt is now {num_responses}"
        for group_id in redrawn:
            ledger.replace_responses(group_id, {}, why=why)
        db.execute(f"UPDATE groups SET num_responses = ? WHERE {open_groups}", [num_responses, step])
        regraded = []
        if regrade:
            graded = f"SELECT group_id FROM groups WHERE {open_groups} AND state IN ('graded', 'committed')"
            regraded = [row[0] for row in db.execute(graded, [step]).fetchall()]
            ledger.drop_grades(regraded, why=regrade)
        # What is in flight is of these terms now, so that no step after `step` will have anything of others.
        begin_span(ledger, step + 1, terms.sampling, terms.grading)
        ledger.set_fact("sampling", json.dumps(terms.sampling, sort_keys=True))
        ledger.set_fact("grading", json.dumps(terms.grading, sort_keys=True))
    reasons = [why] * bool(redrawn) + [regrade] * bool(regraded)
    return UnderOtherTerms(redrawn=len(redrawn), regraded=len(regraded), why="; ".join(reasons))


def check_replay(reader: LedgerReader, terms: Terms, first: int, last: int) -> str:
    """What a run that trains on recorded steps sets otherwise than the run that recorded them, in words; or nothing.

    Args:
        reader: of the recorded run; steps that it does not say the settings of are taken as they are.
        terms: of the run that trains.
        first, last: steps that it trains on, counted from 1.

    Raises:
        RolloutError: the tokens would mean something else, or have other probabilities by definition.
    """
    refused: list[str] = []
    told: list[str] = []
    judged = [s for s in spans(reader.fact) if s.first <= last and (s.last is None or s.last >= first)]
    for span in judged:
        begin, end = max(span.first, first), last if span.last is None else min(span.last, last)
        steps = f"step {begin}" if begin == end else f"steps {begin} to {end}"
        other: dict[bool, list[str]] = {True: [], False: []}
        for stored, now in ((span.sampling, terms.sampling), (span.grading, terms.grading)):
            for changed, before, here in _changes(stored, now):
                if changed not in stored:
                    continue  # that run did not know the setting
                text = f"{changed}: {json.dumps(before)} there, {json.dumps(here)} here"
                other[changed in DEFINING].append(text)
        refused += [f"{steps}: {', '.join(other[True])}"] * bool(other[True])
        told += [f"{steps}: {', '.join(other[False])}"] * bool(other[False])
    if refused:
        apart = ", and replay steps of different settings apart (scheduling.replay_first_step, replay_last_step)"
        raise RolloutError(
            f"{reader.file}: recorded under other settings ({'; '.join(refused)}); set them as that run had them"
            f"{apart if len(judged) > 1 else ''} (scheduling.replay_from)"
        )
    return "; ".join(told)


def recorded_opening(reader: LedgerReader) -> Callable[[int | None], str]:
    """What the chat template opened for the responses of a ledger, as they were graded; mostly empty.

    Returns:
        It by step; None is for groups of no step yet, whose grades are of the newest terms.
    """
    known = spans(reader.fact)

    def opening(step: int | None) -> str:
        return next((str(s.grading.get(OPENING, "")) for s in known[::-1] if step is None or s.first <= step), "")

    return opening


def _differences(stored: str | None, now: Mapping[str, Any], done: str) -> str:
    """What differs, in words; empty when nothing does."""
    if stored is None:
        return f"{_UNKNOWN} {done}"
    return ", ".join(f"{name}: {json.dumps(a)} -> {json.dumps(b)}" for name, a, b in _changes(json.loads(stored), now))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names of values that differ, with the stored one and the one of now."""
    here: dict[str, Any] = json.loads(json.dumps(now))  # tuples are lists there
    names = sorted({*before, *here})
    return [(name, before.get(name), here.get(name)) for name in names if before.get(name) != here.get(name)]
