"""Settings of a run: typed, documented, checked all at once, without importing torch."""

from __future__ import annotations

from megatron_klear.config.architecture import (
    PRESETS,
    Architecture,
    ModelSettings,
    padded_vocab_size,
    read_hf_architecture,
    resolve_architecture,
)
from megatron_klear.config.command_line import parse_command_line
from megatron_klear.config.described import settings_help
from megatron_klear.config.loading import dump_settings, load_settings
from megatron_klear.config.schema import (
    AlgorithmSettings,
    CheckpointSettings,
    CorrectionSettings,
    DataSettings,
    Entry,
    EvaluationSettings,
    ObserveSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RewardSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    Settings,
    SftSettings,
    TokenizerSettings,
)
from megatron_klear.config.serving import SchedulingSettings

__all__ = [
    "PRESETS",
    "AlgorithmSettings",
    "Architecture",
    "CheckpointSettings",
    "CorrectionSettings",
    "DataSettings",
    "Entry",
    "EvaluationSettings",
    "ModelSettings",
    "ObserveSettings",
    "OptimizerSettings",
    "PackingSettings",
    "ParallelSettings",
    "RewardSettings",
    "RlSettings",
    "RolloutSettings",
    "RunSettings",
    "SchedulingSettings",
    "Settings",
    "SftSettings",
    "TokenizerSettings",
    "dump_settings",
    "load_settings",
    "padded_vocab_size",
    "parse_command_line",
    "read_hf_architecture",
    "resolve_architecture",
    "settings_help",
]
