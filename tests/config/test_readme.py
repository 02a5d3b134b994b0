"""What the README says to do with Qwen3-8B works as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_klear.plan import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Words of every line in a block of commands that names something in examples/, comments left out."""
    found, fence = [], ""
    for line in README.splitlines():
        if line.startswith("```"):
            fence = "" if fence else line
        elif fence == "```" and "examples/" in line:
            found.append(shlex.split(line, comments=True))
    return found


def test_every_file_that_a_command_names_is_there() -> None:
    named = {word for command in commands() for word in command if word.startswith("examples/")}
    assert {"examples/qwen3_8b/run.sh", "examples/qwen3_8b/sft.yaml", "examples/qwen3_8b/layouts/sft-8.yaml"} <= named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_the_plans_that_it_shows_can_be_made_and_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    plans = [command[3:] for command in commands() if command[1:3] == ["-m", "megatron_klear.plan"]]
    assert len(plans) == 1
    for arguments in plans:
        assert main(arguments) == 0
        assert "fits: " in capsys.readouterr().out
