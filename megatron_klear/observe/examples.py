"""Rollouts kept for people to read: rollouts/examples.jsonl in the run directory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_klear.observe.jsonl import JsonLinesFile, read_json_lines

EXAMPLES_FILE = Path("rollouts") / "examples.jsonl"

EXAMPLE_FIELDS: dict[str, type] = {
    "step": int,
    "prompt_id": str,
    "prompt": str,
    "reference": str,
    "response": str,
    "outcome": str,
    "reward": float,
    "reason": str,
    "finish_reason": str,
}
"""Fields of a line: the step that sampled it, the problem as text, the gold answer, the decoded response with its
thinking part, and what the grader said (`outcome` and `finish_reason` as in `records`)."""


def append_examples(run_dir: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Adds rollouts to the examples of a run and puts them on disk; returns how many.

    Args:
        run_dir: the run directory.
        rows: mappings with every field of `EXAMPLE_FIELDS`; further fields are kept as they are.

    Raises:
        ValueError: if a field is missing, of another type or not finite; nothing is written then.
    """
    checked = [_checked(row) for row in rows]
    if not checked:
        return 0
    file = JsonLinesFile(Path(run_dir) / EXAMPLES_FILE)
    try:
        return sum(file.append(row) for row in checked)
    finally:
        file.close()


def read_examples(run_dir: str | Path) -> list[dict[str, Any]]:
    """The examples of a run in the order of writing; empty where there are none, damaged lines left out."""
    path = Path(run_dir) / EXAMPLES_FILE
    if not path.is_file():
        return []
    return [row for row in read_json_lines(path) if not _problems(row)]


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    problems = _problems(row)
    if problems:
        raise ValueError(f"example rollout: {'; '.join(problems)}")
    return {**row, "reward": float(row["reward"])}


def _problems(row: Mapping[str, Any]) -> list[str]:
    problems = [f"{name} is missing" for name in EXAMPLE_FIELDS if name not in row]
    for name, kind in EXAMPLE_FIELDS.items():
        allowed = (int, float) if kind is float else (kind,)
        if name in row and not isinstance(row[name], allowed):
            problems.append(f"{name} is {type(row[name]).__name__}, must be {kind.__name__}")
    reward = row.get("reward")
    if isinstance(reward, float) and not math.isfinite(reward):
        problems.append(f"reward is {reward}, must be finite")
    return problems
