"""Which sequences a run has trained, by epoch, from its log `sequences.jsonl`: every one once, or which ones twice."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_klear.errors import DataError

SEQUENCES_FILE = "sequences.jsonl"
"""Lines {"step": 3, "ids": {"0": ["a", "b"], "1": ["c"]}}, the ids of a step by epoch, in the run directory."""

_NAMED = 20
"""Repeated ids that are named of an epoch; of the others only the number."""


def trained_sequences(run: Path) -> tuple[list[str], bool]:
    """Count what a run has trained.

    Args:
        run: the run directory, of a run that has ended or is going on.

    Returns:
        A line for people on every epoch, and whether no sequence was trained twice in any.

    Raises:
        DataError: there is no log, or a line before its last is none (the last may be half written).
    """
    seen: dict[int, set[str]] = {}
    twice: dict[int, list[str]] = {}
    path = run / SEQUENCES_FILE
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name the directory of a run of train_sft") from error
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            ids = {int(epoch): names for epoch, names in json.loads(line)["ids"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: no line of a sequence log ({type(error).__name__}: {error})") from error
        for epoch, names in ids.items():
            before = seen.setdefault(epoch, set())
            for name in names:
                if name in before:
                    twice.setdefault(epoch, []).append(name)
                before.add(name)
    return [_told(epoch, len(seen[epoch]), twice.get(epoch, [])) for epoch in sorted(seen)], not twice


def _told(epoch: int, count: int, twice: list[str]) -> str:
    if not twice:
        return f"epoch {epoch}: {count} sequences, each once"
    named = ", ".join(twice[:_NAMED]) + (f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else "")
    return f"epoch {epoch}: {count} sequences, more than once: {named}"
