"""The choice of where a step's groups come from."""

from __future__ import annotations

from megatron_klear.data import PromptData
from megatron_klear.session.ledger import RunLedger
from megatron_klear.session.managed import ManagedGroups
from megatron_klear.session.recorded import Recorded
from megatron_klear.session.rollouts import Rollouts
from megatron_klear.session.serving import ServedEngine
from megatron_klear.session.session import Session


def step_groups(session: Session, prompts: PromptData, rollouts: Rollouts | Recorded) -> RunLedger | ManagedGroups:
    """Servers are kept busy by the manager; the engine inside the training processes generates when it is asked to.

    A replay generates nothing, and `scheduling.rollout_only` has no training to generate beside.

    Raises:
        CheckpointError: the ledger cannot be used, or is not the one of the run's checkpoint.
    """
    if isinstance(rollouts, Recorded) or session.settings.scheduling.rollout_only:
        return RunLedger(session, prompts)
    engine = rollouts.engine
    if not isinstance(engine, ServedEngine):
        return RunLedger(session, prompts)
    engine.expect_manager()
    return ManagedGroups(
        session, prompts, rollouts, engine.endpoints, engine.restart, engine.most_requests, engine.servers_each
    )
