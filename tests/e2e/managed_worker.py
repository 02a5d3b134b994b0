"""train_rl with simulated engines beside it: everything is real but the tokens, which come from a random generator.

python managed_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager

from megatron_klear import train_rl
from megatron_klear.config import checks
from megatron_klear.rollout.endpoint import GenerationRequest
from megatron_klear.rollout.simulation import SimulatedEngine
from megatron_klear.session import groups, managed
from megatron_klear.session.launch import leave, run_entry

SECONDS_PER_TOKEN = float(os.environ.get("SIMULATED_SECONDS_PER_TOKEN", "0.02"))


def remaining(request: GenerationRequest) -> int:
    digest = hashlib.blake2b(f"{request.seed}+{len(request.token_ids)}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % 14


class Simulated(managed.ManagedGroups):
    """Takes the place of `step_groups`; the engines get only the version of a publish."""

    def __init__(self, session, prompts, rollouts) -> None:
        self.engines = [
            SimulatedEngine(
                f"engine {i}", remaining=remaining, slots=2, seconds_per_token=SECONDS_PER_TOKEN, report_seconds=0.1,
                version=session.step, vocab_size=session.arch.vocab_size,
            )
            for i in range(2)
        ]  # fmt: skip
        super().__init__(session, prompts, rollouts, lambda: self.engines)

    @contextmanager
    def publishing(self, version: int):
        with super().publishing(version) as goes_on:
            yield goes_on
            for engine in self.engines if goes_on else ():
                engine.version = version

    def groups(self, step, cursor, rollouts):
        found = super().groups(step, cursor, rollouts)
        if "SIMULATED_SLOW_AFTER_A_STEP" in os.environ and self._manager is not None:
            for engine in self.engines:  # what is in flight now takes hours
                self._manager._loop.call_soon_threadsafe(engine.change_speed, 3600.0)
        return found


if __name__ == "__main__":
    groups.step_groups = Simulated
    checks._check_scheduling = lambda settings, problems: None  # `rollout.engine` has no name for simulated engines
    leave(run_entry("rl", train_rl.main))
