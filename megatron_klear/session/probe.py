"""Proof of weights by log-probabilities: what engines say of a probe sequence against what the trainer says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_klear.config.serving import WeightSyncSettings
from megatron_klear.errors import WeightSyncError
from megatron_klear.records import FloatArray, IntArray
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang import ConnectedEngine, SglangEngine
from megatron_klear.weight_sync import EngineGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A sequence and what the trainer says of it.

    Attributes:
        token_ids: int64 [T].
        logprobs: float32 [T], of every token given those before it, at temperature 1; entry 0 is 0.
    """

    token_ids: IntArray
    logprobs: FloatArray

    def prove(
        self,
        engine: SglangEngine,
        engines: Sequence[ConnectedEngine],
        group: EngineGroup,
        settings: WeightSyncSettings,
        waiting: Callable[[], None],
    ) -> None:
        """Ask all engines at once; one that gives no answer is left out where it can be done without.

        Args:
            engine: asks them.
            engines: that are to have the trainer's weights.
            group: leaves them out.
            settings: how long an answer may take, and how far it may be off.
            waiting: called while answers are waited for, several times a second.

        Raises:
            WeightSyncError: log-probabilities differ; names the engine.
            EndpointError: an engine gave no answer and cannot be done without.
        """
        found = engine.scores(
            [one.endpoint for one in engines], self.token_ids, timeout_seconds=settings.timeout_seconds, waiting=waiting
        )
        for caller, theirs in zip((one.caller for one in engines), found, strict=True):
            if isinstance(theirs, EndpointError):
                if not (theirs.retry and group.goes_on_without(caller, str(theirs))):
                    raise theirs
                continue
            difference = float(np.abs(theirs - self.logprobs).max())
            if not difference <= settings.logprob_tolerance:
                raise WeightSyncError(
                    f"{caller.name}: log-probabilities of a probe sequence differ from the trainer's by up to "
                    f"{difference:.3g} nats, more than weight_sync.logprob_tolerance = {settings.logprob_tolerance}"
                )
