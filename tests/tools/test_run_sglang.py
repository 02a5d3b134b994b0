"""Which environments tests/run_sglang.sh makes and which tests it runs in them; all that it calls is a stand-in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a copy of the script; returns how it ended, and what it had done, line by line."""
    root, programs, calls = tmp_path / "root", tmp_path / "bin", tmp_path / "calls"
    (root / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run_sglang.sh", root / "tests")
    script(root / "tools" / "setup_env.sh", "exit 0")
    script(root / "tests" / "slurm" / "cluster.sh", "exit 0")
    script(root / "tests" / "reward" / "bubblewrap.sh", "exit 0")
    script(
        root / "tools" / "setup_sglang.sh",
        f'echo "made ${{KLEAR_SGLANG_VENV#{root}/}} $KLEAR_SGLANG_DEVICE" >> {calls}\n'
        '[ "$KLEAR_SGLANG_DEVICE" != "$NO_SET_UP" ]',
    )
    script(
        root / "python" / "bin" / "python",
        f'echo "in ${{KLEAR_SGLANG_VENV#{root}/}}: $*" >> {calls}\n'
        'case "$*" in *"-m gpu"*) exit "${GPU_STATUS:-0}";; *) exit "${CPU_STATUS:-0}";; esac',
    )

    def ended(*arguments: str, gpu: bool, **changes: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls.write_text("")
        script(programs / "nvidia-smi", "echo 'GPU 0: a stand-in'" if gpu else "echo 'No devices were found'; exit 6")
        outside = {name: value for name, value in os.environ.items() if not name.startswith("KLEAR_")}
        environment = outside | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "KLEAR_VENV": str(root / "python"),
        } | changes  # fmt: skip
        done = subprocess.run(
            ["bash", str(root / "tests" / "run_sglang.sh"), *arguments],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return ended


def test_without_a_gpu_there_is_one_environment_for_the_cpu(run: Run) -> None:
    done, calls = run("-x", gpu=False)
    assert (done.returncode, len(calls)) == (0, 2), done.stderr
    assert calls[0] == "made .venv-sglang cpu"
    assert calls[1].startswith("in .venv-sglang: -m pytest tests/rollout/sglang tests/weight_sync ")
    assert calls[1].endswith(" -x")


def test_with_a_gpu_each_kind_of_test_has_an_environment_of_its_own(run: Run) -> None:
    done, calls = run("-x", gpu=True)
    assert done.returncode == 0, done.stderr
    assert calls[:3] == [
        "made .venv-sglang-cpu cpu",
        "made .venv-sglang cuda",
        "in .venv-sglang: -m pytest -m gpu tests/e2e/test_colocated_gpu.py tests/rollout/sglang/test_repeatable.py -x",
    ]
    assert calls[3].startswith("in .venv-sglang-cpu: -m pytest tests/rollout/sglang ")
    assert len(calls) == 4


def test_the_directories_can_be_chosen_and_are_two(run: Run) -> None:
    _, calls = run(gpu=True, KLEAR_SGLANG_VENV="/one", KLEAR_SGLANG_CUDA_VENV="/other")
    assert calls[:2] == ["made /one cpu", "made /other cuda"]
    done, calls = run(gpu=True, KLEAR_SGLANG_VENV="/one/", KLEAR_SGLANG_CUDA_VENV="/one")
    assert (done.returncode, calls) == (2, [])
    assert "KLEAR_SGLANG_VENV and KLEAR_SGLANG_CUDA_VENV are both /one" in done.stderr


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"GPU_STATUS": "5"}, 0),
        ({"GPU_STATUS": "1"}, 1),
        ({"CPU_STATUS": "1"}, 1),
        ({"NO_SET_UP": "cuda"}, 1),
    ],
    ids=["none marked gpu was asked for", "one marked gpu fails", "another fails", "no set-up for the gpu"],
)
def test_a_failure_of_either_run_is_one_of_both_and_keeps_none_back(
    run: Run, changes: dict[str, str], status: int
) -> None:
    done, calls = run(gpu=True, **changes)
    assert done.returncode == status
    assert calls[-1].startswith("in .venv-sglang-cpu: -m pytest tests/rollout/sglang ")


def test_what_has_run_is_not_run_again_by_the_whole_command() -> None:
    """.ci/run leaves out the files that `--files` names: each is there, and what asks for a server is in one."""
    done = subprocess.run(
        ["bash", "tests/run_sglang.sh", "--files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = [ROOT / name for name in done.stdout.split()]
    assert all(path.exists() for path in named)
    assert "mapfile -t ran < <(bash tests/run_sglang.sh --files)" in (ROOT / ".ci" / "run").read_text()
    asking = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and re.search(r"sglang_(settings|urls)\b", path.read_text())
    ]
    assert len(asking) > 10
    left = [path.name for path in asking if not any(path.is_relative_to(name) for name in named)]
    assert left == ["test_colocated_gpu.py"], "it is marked gpu, and run apart"


def test_every_file_marked_gpu_that_needs_sglang_is_run() -> None:
    text = (ROOT / "tests" / "run_sglang.sh").read_text()
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and "mark.gpu" in path.read_text() and "sglang_settings" in path.read_text()
    ]
    assert len(found) >= 2
    assert all(name in text for name in found)
