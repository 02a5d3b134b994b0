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
from megatron_klear.config.command_line import parse_command_line, parse_tool_arguments
from megatron_klear.config.data import BIN_MULTIPLE, INDEX_FOLDER, DataSettings, dali_installed, row_files
from megatron_klear.config.described import settings_help
from megatron_klear.config.loading import dump_settings, load_data_settings, load_settings
from megatron_klear.config.precision import Fp8Settings
from megatron_klear.config.rewards import CodeRewardSettings, RewardSettings
from megatron_klear.config.schema import (
    AlgorithmSettings,
    CheckpointSettings,
    CorrectionSettings,
    Entry,
    EvaluationSettings,
    ObserveSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RlSettings,
    RolloutSettings,
    RunSettings,
    Settings,
    SftSettings,
    TokenizerSettings,
)
from megatron_klear.config.serving import ENGINE_FREE_SECONDS, SchedulingSettings

__all__ = [
    "BIN_MULTIPLE",
    "ENGINE_FREE_SECONDS",
    "INDEX_FOLDER",
    "PRESETS",
    "AlgorithmSettings",
    "Architecture",
    "CheckpointSettings",
    "CodeRewardSettings",
    "CorrectionSettings",
    "DataSettings",
    "Entry",
    "EvaluationSettings",
    "Fp8Settings",
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
    "dali_installed",
    "dump_settings",
    "load_data_settings",
    "load_settings",
    "padded_vocab_size",
    "parse_command_line",
    "parse_tool_arguments",
    "read_hf_architecture",
    "resolve_architecture",
    "row_files",
    "settings_help",
]
