"""train_rl, one of whose servers is lost before any has weights.

LOST=HOW python lost_at_start_worker.py CONFIG.yaml [section.field=value ...]

HOW is `killed`, when all have been found in order, or `unstarted`: it ends while it starts, the first time.
"""

from __future__ import annotations

import os
from typing import Any

import psutil

from megatron_klear import train_rl
from megatron_klear.rollout.sglang import fleet
from megatron_klear.rollout.sglang.command import server_command
from megatron_klear.session import rollouts, serving
from megatron_klear.session.launch import leave, run_entry


class Losing(serving.ServedEngine):
    """Server 1 is lost before the first publish."""

    def update_weights(self, *arguments: object, version: int) -> None:
        if self._engine is not None and self.policy_version < 0 and os.environ["LOST"] == "killed":
            assert self._fleets is not None
            assert self._fleets._fleet is not None
            [server] = psutil.Process(self._fleets._fleet.pid(1)).children()
            server.kill()
            server.wait(30)
        super().update_weights(*arguments, version=version)  # type: ignore[arg-type]


def failing_once(*arguments: Any, **options: Any) -> list[str]:
    """The command of each server but of server 1's first start."""
    commands.append(server_command(*arguments, **options))
    return ["/bin/sh", "-c", "echo no memory; exit 3"] if len(commands) == 2 else commands[-1]


commands: list[list[str]] = []

if __name__ == "__main__":
    if os.environ["LOST"] == "unstarted":
        fleet.server_command = failing_once
    rollouts.ServedEngine = Losing  # type: ignore[misc]
    leave(run_entry("rl", train_rl.main))
