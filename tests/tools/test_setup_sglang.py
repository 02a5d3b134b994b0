"""The set-up script of SGLang's environment against a stand-in for Python that records what it is asked to do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "setup_sglang.sh"

STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1 $2" in
    "-m venv")
        for last in "$@"; do :; done
        mkdir -p "$last/bin" "$last/lib"; touch "$last/pyvenv.cfg"; cp "$0" "$last/bin/python" ;;
    "-m pip") case "$*" in *"$FAILS_ON"*) echo "no such package"; exit 1 ;; esac ;;
    "--version ") echo "Python 3.12.0" ;;
    "-c import sysconfig"*) echo "$KLEAR_SGLANG_VENV/lib" ;;
    "-c import sys; print(sys.version)") echo "3.12.0 (stand-in)" ;;
    "-c import importlib"*) echo "Python 3.12.0, stand-in" ;;
esac
"""


class SetUp:
    """Runs the script with a PATH on which python3.11 is the stand-in."""

    def __init__(self, directory: Path) -> None:
        self.venv, self.calls = directory / "venv", directory / "calls"
        programs = directory / "bin"
        programs.mkdir()
        (programs / "python3.11").write_text(STAND_IN)
        (programs / "python3.11").chmod(0o755)
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(directory),
            "KLEAR_SGLANG_VENV": str(self.venv),
            "KLEAR_SGLANG_DEVICE": "cpu",
            "CALLS": str(self.calls),
            "FAILS_ON": "nothing at all",
        }

    def __call__(self, **changes: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        environment = self.environment | changes
        return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)

    def installs(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def set_up(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_a_cpu_gets_no_kernel_packages_and_the_shims(set_up):
    result = set_up()
    assert result.returncode == 0, result.stderr
    installs = set_up.installs()
    assert installs[0].endswith(" torch")
    assert "--no-deps sglang triton torchvision apache-tvm-ffi sglang-router" in installs[-1]
    assert not any(re.search(r"sglang-kernel|flashinfer|torchaudio|sgl-", line) for line in installs)
    assert all(f"-c {set_up.venv}/constraints.txt" in line for line in installs)
    assert (set_up.venv / "lib" / "sgl_kernel" / "__init__.py").exists()
    assert (set_up.venv / "lib" / "klear_sglang_cpu.pth").read_text() == "import klear_sglang_cpu\n"
    entry_points = (set_up.venv / "lib" / "klear_sglang_cpu-1.dist-info" / "entry_points.txt").read_text()
    assert entry_points == "[sglang.srt.plugins]\nklear_cpu = klear_sglang_plugin:register\n"
    assert (set_up.venv / "lib" / "klear_sglang_plugin.py").exists()
    assert "torch==2.13.0" in (set_up.venv / "constraints.txt").read_text()


def test_a_gpu_gets_sglangs_own_torch_and_kernels(set_up):
    result = set_up(KLEAR_SGLANG_DEVICE="cuda")
    assert result.returncode == 0, result.stderr
    assert set_up.installs()[-1].endswith(" sglang sglang-router")
    assert not (set_up.venv / "lib" / "sgl_kernel").exists()
    pins = (set_up.venv / "constraints.txt").read_text()
    assert "sglang==" in pins
    assert not re.search(r"^(torch|triton|torchvision)==", pins, re.MULTILINE)


def test_a_second_run_does_nothing_and_another_device_starts_over(set_up):
    set_up()
    assert "is up to date" in set_up().stdout
    assert set_up.installs() == []
    result = set_up(KLEAR_SGLANG_DEVICE="cuda")
    assert "unfinished or out of date; starting over" in result.stdout


def test_a_failed_step_is_named_and_done_again(set_up):
    failed = set_up(FAILS_ON="--no-deps")
    assert failed.returncode == 1
    assert "this step failed: 4/4 SGLang on torch alone" in failed.stderr
    assert "no such package" in failed.stderr
    assert set_up().returncode == 0


def test_wrong_choices_are_refused(set_up):
    assert "KLEAR_SGLANG_DEVICE=tpu must be cpu, cuda or auto" in set_up(KLEAR_SGLANG_DEVICE="tpu").stderr
    set_up.venv.mkdir()
    (set_up.venv / "thesis.tex").write_text("years of work")
    result = set_up()
    assert result.returncode == 1
    assert "no virtual environment" in result.stderr


def test_help_tells_the_variables():
    result = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, timeout=30)
    for variable in ("KLEAR_SGLANG_VENV", "KLEAR_SGLANG_DEVICE", "KLEAR_PYTHON"):
        assert variable in result.stdout


def test_pins_are_exact_and_without_local_suffixes():
    lines = (ROOT / "constraints-sglang.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^+\s]+", pin) for pin in pins)
    assert "sglang==0.5.23" in pins
