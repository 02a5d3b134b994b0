"""Settings for planning a run elsewhere: what they name need not be there, and problems are told, not fatal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.config.architecture import resolve_architecture, without_absent_weights
from megatron_klear.config.checks import find_problems
from megatron_klear.config.described import TRAINING
from megatron_klear.config.loading import _known_keys, _read, _validated
from megatron_klear.config.schema import Entry, Settings
from megatron_klear.errors import ConfigError


def judge_plan(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    entry: Entry,
    world_size: int,
    ranks_per_machine: int | None = None,
) -> tuple[Settings, list[str]]:
    """Read settings and judge them together, without their files.

    Args:
        path, overrides, entry, world_size: as in `load_settings`.
        ranks_per_machine: how many ranks a machine has, where that matters.

    Returns:
        Settings with all sizes of the model filled in, and why they cannot work together, if they cannot.

    Raises:
        ConfigError: there is nothing to plan with: unreadable files, unknown settings, bad values, no architecture.
    """
    unusable: list[str] = []
    tree = _known_keys(TRAINING, _read(Path(path), overrides), unusable)
    settings, broken = _validated(TRAINING, tree, unusable)
    together = find_problems(
        settings, entry=entry, world_size=world_size, broken=broken, inputs=False, ranks_per_machine=ranks_per_machine
    )
    if unusable:
        raise ConfigError(list(dict.fromkeys([*unusable, *together])))
    try:
        sizes = dataclasses.asdict(resolve_architecture(without_absent_weights(settings.model)))
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys([*together, *error.problems]))) from None
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **sizes)), together
