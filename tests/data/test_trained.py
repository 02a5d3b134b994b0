"""Counting what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_klear.data.__main__ import main
from megatron_klear.data.trained import trained_sequences
from megatron_klear.errors import DataError


def log(run: Path, *steps: dict[str, list[str]], tail: str = "") -> Path:
    lines = [json.dumps({"step": number, "ids": ids}) + "\n" for number, ids in enumerate(steps, start=1)]
    (run / "sequences.jsonl").write_text("".join(lines) + tail)
    return run


def test_each_once_per_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = log(tmp_path, {"0": ["a", "b"]}, {"0": ["c"], "1": ["b"]}, {"1": ["a"]}, tail='{"step": 4, "ids": {"1": ["b"')
    assert main(["--trained", str(run)]) == 0
    assert capsys.readouterr().out == "epoch 0: 3 sequences, each once\nepoch 1: 2 sequences, each once\n"


def test_what_is_there_twice_is_named_and_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = log(tmp_path, {"0": ["a", "b"]}, {"0": ["b"], "1": ["a"]}, {"1": ["b", "a"], "0": ["a"]})
    assert main(["--trained", str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["epoch 0: 2 sequences, more than once: b, a", "epoch 1: 2 sequences, more than once: a"]
    many = [f"r{number}" for number in range(30)]
    (line,), is_sound = trained_sequences(log(tmp_path, {"0": many}, {"0": many}))
    assert not is_sound
    assert line.endswith("r19 and 10 more")


@pytest.mark.parametrize("line", ["", "[1]", '{"step": 1}', '{"ids": {"x": ["a"]}}', '{"ids": ["a"]}', "\xff"])
def test_a_line_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    log(tmp_path, {"0": ["a"]}, tail=f"{line}\n")
    with pytest.raises(DataError, match=r"sequences\.jsonl:2: no line of a sequence log"):
        trained_sequences(tmp_path)


def test_a_directory_without_a_log_and_a_call_without_a_directory(tmp_path, capsys) -> None:
    assert main(["--trained", str(tmp_path)]) == 2
    assert (
        "sequences.jsonl: No such file or directory; name the directory of a run of train_sft"
        in capsys.readouterr().err
    )
    assert main(["--trained"]) == 2
    assert "--trained: got 0 arguments, expected the directory of one run" in capsys.readouterr().err
    log(tmp_path)
    assert main(["--trained", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no step is trained yet\n"
