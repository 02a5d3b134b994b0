"""The stages by name."""

from __future__ import annotations

from collections.abc import Callable

from megatron_klear.config.curation import CurationSettings, stages_of
from megatron_klear.curation.correctness import CorrectnessStage
from megatron_klear.curation.decontaminate import DecontaminateStage
from megatron_klear.curation.dedup import DedupStage
from megatron_klear.curation.export import ExportStage
from megatron_klear.curation.read import ReadStage
from megatron_klear.curation.responding import DifficultyStage, RespondStage
from megatron_klear.curation.selection import SelectStage
from megatron_klear.curation.sources import SourcesStage
from megatron_klear.curation.stage import Stage
from megatron_klear.curation.verify_rl import SolvableStage, TestsStage

_STAGES: dict[str, Callable[[CurationSettings], Stage]] = {
    "read": ReadStage,
    "dedup": DedupStage,
    "decontaminate": DecontaminateStage,
    "sources": SourcesStage,
    "select": SelectStage,
    "tests": TestsStage,
    "respond": RespondStage,
    "difficulty": DifficultyStage,
    "correctness": CorrectnessStage,
    "solvable": SolvableStage,
    "export": ExportStage,
}


def make_stage(name: str, settings: CurationSettings) -> Stage:
    """The stage of a name."""
    return _STAGES[name](settings)


def all_stages(settings: CurationSettings) -> list[Stage]:
    """All stages of a run in order, reading and exporting included."""
    return [make_stage(name, settings) for name in ("read", *stages_of(settings), "export")]
