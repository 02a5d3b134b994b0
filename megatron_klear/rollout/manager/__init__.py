"""The rollout manager: many engines, one ledger, and the groups of the next step when they are ready.

It decides by `scheduling.*` when a group may be started (so that its tokens cannot become too old), which engine gets
it, what happens to it when that engine fails, and which groups make a step.
"""

from __future__ import annotations

from megatron_klear.rollout.manager.dispatch import Sampling
from megatron_klear.rollout.manager.grading import Grader
from megatron_klear.rollout.manager.health import Restart
from megatron_klear.rollout.manager.manager import RolloutManager
from megatron_klear.rollout.manager.scheduler import Scheduler
from megatron_klear.rollout.manager.start_limit import StartLimit

__all__ = ["Grader", "Restart", "RolloutManager", "Sampling", "Scheduler", "StartLimit"]
