"""tools/convert as a person runs it: its help, its exit status, its progress, and being killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.convert_cli import main
from megatron_klear.observe.work_progress import WorkProgress

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "convert"


@pytest.fixture(scope="module")
def hf(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "hf", dtype=torch.bfloat16)


def run_tool(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOL, *arguments],
        cwd=cwd,
        env={**os.environ, "KLEAR_VENV": sys.prefix, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_runs_from_any_directory_and_through_a_link(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "convert").symlink_to(TOOL)
    done = subprocess.run(
        [tmp_path / "bin" / "convert", "hf-to-megatron", "--hf", str(hf), "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "KLEAR_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step_00000000" in done.stdout
    assert layout.finished_steps(tmp_path / "run" / "checkpoints") == [0]
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["hf-to-megatron", "--help"], ["megatron-to-hf", "--help"]])
def test_help_teaches_without_importing_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_tool(*arguments, cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "tools/convert megatron-to-hf --checkpoint runs/math" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["hf-to-megatron", "--hf", "x"],
        ["megatron-to-hf", "--checkpoint", "x", "--out", "y", "--shard-gb", "0"],
        ["megatron-to-hf", "--checkpoint", "x", "--out", "y", "--dtype", "int8"],
        ["hf-to-megatron", "--hf", "x", "--out", "y", "--vocab-multiple", "-1"],
        ["hf-to-megatron", "--hf", "nowhere", "--out", "y"],
        ["megatron-to-hf", "--checkpoint", "nowhere", "--out", "y"],
    ],
)
def test_bad_input_is_status_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stopped:  # argparse's way
        status = int(str(stopped.code))
    assert status == 2
    assert capsys.readouterr().err.strip()
    assert list(tmp_path.iterdir()) == []


def test_there_and_back(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "run"), "--vocab-multiple", "7"]) == 0
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--dtype", "float32"]
    assert main(["megatron-to-hf", *arguments]) == 0
    expected = {name: t.float() for file in hf.glob("*.safetensors") for name, t in load_file(file).items()}
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    captured = capsys.readouterr()
    assert "47 tensors" in captured.out
    assert "writing: 47/47 tensors" in captured.err


def test_failing_to_write_is_status_1(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "file" / "run")]) == 1
    assert "nothing was kept" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from megatron_klear.checkpoint import safetensors_stream, torch_dist_stream
from megatron_klear.checkpoint.convert_cli import main
count = 0
def stop_at(real):
    def counted(*arguments):
        global count
        count += 1
        if count == 20:
            os.kill(os.getpid(), int(sys.argv[1]))
        return real(*arguments)
    return counted
safetensors_stream.StoredTensor.rows = stop_at(safetensors_stream.StoredTensor.rows)
torch_dist_stream.TorchDistReader.read = stop_at(torch_dist_stream.TorchDistReader.read)
sys.exit(main(sys.argv[2:]))
"""


def run_and_kill(signal_number: int, *arguments: str) -> int:
    command = [sys.executable, "-c", KILLED, str(signal_number), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode


def visible(directory: Path) -> list[str]:
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return [str(path) for path in found if not any(part.startswith(".writing") for part in path.parts)]


def test_killed_in_the_middle_nothing_is_visible_and_another_run_succeeds(hf: Path, tmp_path: Path) -> None:
    there = ["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "run")]
    assert run_and_kill(signal.SIGKILL, *there) == -signal.SIGKILL
    assert visible(tmp_path) == []
    assert layout.finished_steps(tmp_path / "run" / "checkpoints") == []
    assert main(there) == 0
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    (tmp_path / "exports").mkdir()
    back = ["megatron-to-hf", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "exports" / "back")]
    assert run_and_kill(signal.SIGKILL, *back) == -signal.SIGKILL
    assert visible(tmp_path / "exports") == []
    assert main(back) == 0
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["back"]


def test_told_to_end_it_cleans_up(hf: Path, tmp_path: Path) -> None:
    assert run_and_kill(signal.SIGTERM, "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "run")) == 1
    assert list(tmp_path.iterdir()) == []


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_lines_say_what_is_done_and_the_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with WorkProgress("writing", 10, 4_000_000, stream=stream, line_seconds=5, clock=clock) as progress:
        progress.advance(1, 100_000)
        clock.now += 6
        progress.advance(1, 900_000)
        clock.now += 1
        progress.advance(1, 0)  # too early for a line
        clock.now += 53
        progress.advance(7, 3_000_000)
    assert stream.getvalue().splitlines() == [
        "writing: 2/10 tensors, 1.00M/4.00M bytes, 0:18 left",
        "writing: 10/10 tensors, 4.00M/4.00M bytes",
        "writing: 10/10 tensors, 4.00M/4.00M bytes in 1:00",
    ]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    with WorkProgress("writing", 2, 200, stream=stream) as progress:
        progress.advance(1, 100)
        progress.advance(1, 100)
    text = stream.getvalue()
    assert "2/2 tensors, 200/200 bytes" in text
    assert "━" in text


def test_a_failure_is_not_followed_by_a_line_that_says_done() -> None:
    stream = io.StringIO()
    with pytest.raises(OSError, match="full"), WorkProgress("writing", 2, 200, stream=stream):
        raise OSError("full")
    assert stream.getvalue() == ""


def test_yarn_by_option(hf: Path, tmp_path: Path) -> None:
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "run")]) == 0
    arguments = ["megatron-to-hf", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--yarn-factor", "2.5", "--yarn-original", "256"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["original_max_position_embeddings"] == 256
    assert config["rope_parameters"]["factor"] == 2.5
    assert config["max_position_embeddings"] == 640
