"""Which steps of a ledger are of which terms: a run may go on under others, and steps that are done keep theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_klear.rollout.ledger.writing import Ledger

_FACT = "terms of steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Steps of the same terms.

    Attributes:
        first: step, counted from 1.
        last: step; None where no other terms follow.
        sampling, grading: see `Terms`; empty where the ledger does not say.
    """

    first: int
    last: int | None
    sampling: Mapping[str, Any]
    grading: Mapping[str, Any]


def spans(fact: Callable[[str], str | None]) -> list[Span]:
    """All of a ledger, the oldest first.

    Args:
        fact: the ledger's.
    """
    stored = fact(_FACT)
    if stored is None:  # an old ledger keeps the terms of its newest life alone
        begun = [(1, json.loads(fact("sampling") or "{}"), json.loads(fact("grading") or "{}"))]
    else:
        begun = json.loads(stored)
    ends = [first - 1 for first, _, _ in begun[1:]]
    return [
        Span(first=first, last=last, sampling=sampling, grading=grading)
        for (first, sampling, grading), last in zip(begun, [*ends, None], strict=True)
    ]


def begin_span(ledger: Ledger, first: int, sampling: Mapping[str, Any], grading: Mapping[str, Any]) -> None:
    """Note that the steps from `first` on are of these terms, whatever those of a life that is rolled back were of.

    To be called before the facts `sampling` and `grading` are written, which an old ledger's steps are judged by.
    """
    begun = [(s.first, s.sampling, s.grading) for s in spans(ledger.fact) if s.first < first]
    now = json.loads(json.dumps([sampling, grading]))  # tuples are lists there
    if not begun or [*begun[-1][1:]] != now:
        begun.append((first, *now))
    ledger.set_fact(_FACT, json.dumps(begun, sort_keys=True))
