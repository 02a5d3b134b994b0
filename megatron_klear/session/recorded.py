"""What a replay has in the place of an engine: its responses are recorded, so nothing generates or wants weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_klear.records import ScoredGroup
from megatron_klear.session.examples import example_rows
from megatron_klear.session.off_policy import WeightProof
from megatron_klear.session.session import Session


class Recorded:
    """The acting side of a run with `scheduling.replay_from`; an engine that evaluates it is `Evaluation`'s own.

    Args:
        session: the run.
    """

    proof: WeightProof = "recorded"
    """Another run's engine sampled the tokens, and this run cannot know by which weights."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def publish(self, version: int) -> None:
        """Nothing generates with these weights."""

    def hand_to_trainer(self) -> None:
        """Nothing has the trainer's memory."""

    def examples(self, groups: Sequence[ScoredGroup], step: int) -> list[dict[str, Any]]:
        """Some right and some wrong responses as rows for the report."""
        return example_rows(self._session, groups, step)
