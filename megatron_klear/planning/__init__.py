"""What a run will take before it is started: memory by part, traffic, time; plain arithmetic, no torch."""

from __future__ import annotations

from megatron_klear.planning.devices import DEVICES, Device
from megatron_klear.planning.estimate import Assumptions, Plan, expected_evenness, make_plan
from megatron_klear.planning.lengths import StoredLengths, stored_lengths
from megatron_klear.planning.memory import StageMemory, stage_memory
from megatron_klear.planning.report import plan_as_json, print_layouts, print_plan
from megatron_klear.planning.search import Candidate, best_layouts, device_problems, settings_in_the_way

__all__ = [
    "DEVICES",
    "Assumptions",
    "Candidate",
    "Device",
    "Plan",
    "StageMemory",
    "StoredLengths",
    "best_layouts",
    "device_problems",
    "expected_evenness",
    "make_plan",
    "plan_as_json",
    "print_layouts",
    "print_plan",
    "settings_in_the_way",
    "stage_memory",
    "stored_lengths",
]
