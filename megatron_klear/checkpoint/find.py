"""Which checkpoint a path means: a run directory, its checkpoints directory, or one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_klear.checkpoint import layout
from megatron_klear.errors import CheckpointError


def find_whole(path: Path, damage_of: Callable[[Path], list[str]] | None = None) -> tuple[Path, list[str]]:
    """The newest whole checkpoint at a path, and a note about every newer one that is damaged.

    Args:
        path: a checkpoint, or a directory with checkpoints in it or in its `checkpoints`.
        damage_of: says what is wrong with a checkpoint; by default sizes and checksums are read here.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    damage_of = damage_of or _damage
    if (path / layout.MANIFEST).exists() or (path / ".metadata").exists():
        problems = damage_of(path)
        if problems:
            raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
        return path, []
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    notes: list[str] = []
    for step in layout.finished_steps(root):
        directory = layout.step_directory(root, step)
        problems = damage_of(directory)
        if not problems:
            return directory, notes
        notes.append(f"{directory} is damaged and was passed over: {'; '.join(problems)}")
    if notes:
        raise CheckpointError(f"{path}: none of the checkpoints is whole: " + "; ".join(notes))
    raise CheckpointError(f"{path}: no checkpoints there; name a run directory or a checkpoint")


def _damage(directory: Path) -> list[str]:
    try:
        return layout.damage(directory, layout.read_manifest(directory))
    except CheckpointError as error:
        return [str(error)]
