"""Wrong arguments of the quickstart are answered before anything is set up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.sh"


def quickstart(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A set-up would fail at once: no such Python.
    environment = {**os.environ, "KLEAR_VENV": str(tmp_path / "venv"), "KLEAR_PYTHON": "/nowhere/python"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def test_help_tells_the_arguments_and_sets_nothing_up(tmp_path):
    done = quickstart(tmp_path, "--help")
    assert done.returncode == 0
    assert "bash examples/quickstart.sh [SEED [DIR]]" in done.stdout
    assert "set -euo" not in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("arguments", [["--seed", "3"], ["runs/mine"], ["12345"], ["1", "a", "b"]])
def test_wrong_arguments_are_refused(tmp_path, arguments):
    done = quickstart(tmp_path, *arguments)
    assert done.returncode == 2
    assert "expected [SEED [DIR]]" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_another_seed_in_the_same_directory_is_refused(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "done").write_text("1\n")
    done = quickstart(tmp_path, "2", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "was begun with seed 1, not 2" in done.stderr
    assert "KLEAR_PYTHON" in quickstart(tmp_path, "1", str(tmp_path / "run")).stderr  # accepted, and then set up
