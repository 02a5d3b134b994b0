"""Engines that only count, in a time that only counts: to try scheduling, and its faults, without a GPU."""

from __future__ import annotations

from megatron_klear.rollout.simulation.clock import SimulatedLoop, run_simulated
from megatron_klear.rollout.simulation.engine import SimulatedEngine

__all__ = ["SimulatedEngine", "SimulatedLoop", "run_simulated"]
