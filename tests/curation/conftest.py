"""Runs of curation over a few rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_klear.config.curation import load_curation_settings
from megatron_klear.curation import CurationResult, curate

SECTIONS = ("input", "decontamination", "sources", "selection", "tests", "teacher", "sampler", "difficulty",
            "correctness", "solvable", "reward", "code_reward", "dedup")  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass
class Run:
    """A finished run and what it left."""

    root: Path
    result: CurationResult

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for file in self.result.files for row in lines(file)]

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]

    @property
    def dropped(self) -> list[dict[str, Any]]:
        return lines(self.root / "dropped.jsonl")

    @property
    def rejects(self) -> list[dict[str, Any]]:
        return lines(self.root / "rejects.jsonl")

    def audit(self, stage: str) -> dict[str, Any]:
        stages = json.loads((self.root / "audit.json").read_text(encoding="utf-8"))["stages"]
        return next(found for found in stages if found["name"] == stage)

    def reasons(self, stage: str) -> Counter[str]:
        return Counter(row["reason"] for row in self.dropped if row["stage"] == stage)


RunCuration = Callable[..., Run]


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows and settings; returns the settings file."""

    def write(
        rows: list[Any] | None = None, *, task: str = "rl", stages: tuple[str, ...] = (), **sections: Any
    ) -> Path:
        source = tmp_path / "rows.jsonl"
        if rows is not None:
            source.write_text(
                "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
            )
        run = {"dir": str(tmp_path / "run"), "task": task, "stages": list(stages), "progress": False}
        content = {"run": run | sections.pop("run", {})}
        content["input"] = {"files": [str(source)], "check_references": False} | sections.pop("input", {})
        assert set(sections) <= set(SECTIONS)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content | sections))
        return path

    return write


@pytest.fixture
def run_curation(write_config: Callable[..., Path], tmp_path: Path) -> RunCuration:
    """Curates rows under some settings."""

    def run(rows: list[Any] | None = None, **settings: Any) -> Run:
        loaded = load_curation_settings(write_config(rows, **settings))
        return Run(tmp_path / "run", curate(loaded))

    return run
