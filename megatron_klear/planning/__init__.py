"""What a run will take before it is started: memory by part, traffic, time; plain arithmetic, no torch."""

from __future__ import annotations

from megatron_klear.planning.devices import DEVICES, Device
from megatron_klear.planning.estimate import Assumptions, Plan, make_plan
from megatron_klear.planning.memory import StageMemory, stage_memory
from megatron_klear.planning.report import plan_as_json, print_layouts, print_plan
from megatron_klear.planning.search import Candidate, best_layouts

__all__ = [
    "DEVICES",
    "Assumptions",
    "Candidate",
    "Device",
    "Plan",
    "StageMemory",
    "best_layouts",
    "make_plan",
    "plan_as_json",
    "print_layouts",
    "print_plan",
    "stage_memory",
]
