"""Which settings may change when a run goes on, judged from its newest checkpoint before torch is imported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_klear.checkpoint import layout
from megatron_klear.config import Entry, Settings, dump_settings
from megatron_klear.config.architecture import SHAPE_FIELDS
from megatron_klear.errors import ConfigError

_FIXED = {
    **{f"model.{name}": "the weights have these sizes" for name in (*SHAPE_FIELDS, "vocab_multiple")},
    "parallel.distributed_optimizer": "the optimizer's state is stored accordingly",
    "run.seed": "it decides the order of the data",
    "data.shuffle": "it decides the order of the data",
    "scheduling.replay_first_step": "the run began there",
    "scheduling.rollout_only": "its steps are either recorded, to be replayed (scheduling.replay_from), or trained",
}
"""Settings that a run keeps for its whole life, and why."""

_NO_NEWS = ("run.dir", "run.resume", "run.device", "observe.", "profile.", "sglang.restart_requests")
"""Settings whose change says nothing about what is trained."""


def changes_at_resume(settings: Settings, entry: Entry) -> list[str]:
    """What is set otherwise than when the run's newest checkpoint was written, one text per setting.

    Nothing when the run has no checkpoint, or one whose settings cannot be read: whether it is whole is judged later.

    Raises:
        ConfigError: the run is another entry's, a setting has changed that a run must keep (all of them at once), or
            another run is to be replayed into one that has a ledger.
    """
    root = Path(settings.run.dir) / "checkpoints"
    steps = layout.finished_steps(root)
    _refuse_replay_over(settings, entry, root, steps)
    if not steps or not settings.run.resume:
        return []
    checkpoint = layout.step_directory(root, steps[0])
    try:
        state = json.loads((checkpoint / layout.RUN_STATE).read_text(encoding="utf-8"))
        before = _flat(yaml.safe_load((checkpoint / layout.SETTINGS).read_text(encoding="utf-8")))
        trained_by = state.get("entry", entry)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    if trained_by != entry:
        raise ConfigError(
            [
                f"run.dir: {settings.run.dir} holds a run of train_{trained_by}; choose another directory, and to "
                f"start from its weights set checkpoint.start_from={settings.run.dir}"
            ]
        )
    now = _flat(yaml.safe_load(dump_settings(settings)))
    changed = [path for path in now if path in before and before[path] != now[path]]
    problems = [
        f"{path}: was {_shown(before[path])} when {checkpoint} was written and is {_shown(now[path])}; {_FIXED[path]}: "
        "set it back, or start in another run.dir"
        for path in changed
        if path in _FIXED and (path != "scheduling.replay_first_step" or settings.scheduling.replay_from is not None)
    ]
    if problems:
        raise ConfigError(problems)
    return [f"{p}: {_shown(before[p])} -> {_shown(now[p])}" for p in changed if not p.startswith(_NO_NEWS)]


def _refuse_replay_over(settings: Settings, entry: Entry, root: Path, steps: list[int]) -> None:
    """Refuse to replay another run in a directory whose own run has a ledger.

    A replay knows nothing of that ledger: its prompts in flight would be left behind, or trained a second time.
    """
    if entry != "rl" or settings.scheduling.replay_from is None:
        return
    has_ledger = (Path(settings.run.dir) / "ledger.sqlite").exists()
    if not has_ledger and steps:
        try:
            state = json.loads((layout.step_directory(root, steps[0]) / layout.RUN_STATE).read_text(encoding="utf-8"))
            has_ledger = state.get("ledger") is not None
        except (OSError, ValueError, AttributeError):
            return  # whether it is whole is judged later
    if has_ledger:
        raise ConfigError(
            [
                f"scheduling.replay_from: {settings.run.dir} holds a run with a rollout ledger of its own, whose "
                "prompts in flight a replay would leave behind; replay in another run.dir, and to start from this "
                f"run's weights set checkpoint.start_from={settings.run.dir} there"
            ]
        )


def _flat(settings: Any) -> dict[str, Any]:
    """Settings by dotted path."""
    sections = {f.name for f in dataclasses.fields(Settings)}
    return {
        f"{section}.{name}": value
        for section, fields in settings.items()
        if section in sections and isinstance(fields, dict)
        for name, value in fields.items()
    }


def _shown(value: Any) -> str:
    return json.dumps(value)
