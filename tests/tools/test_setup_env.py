"""The set-up script against a stand-in for Python that records what it is asked to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "setup_env.sh"

STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1 $2" in
    "-m venv")
        for last in "$@"; do :; done
        mkdir -p "$last/bin"; touch "$last/pyvenv.cfg"; cp "$0" "$last/bin/python" ;;
    "-m pip") case "$*" in *"$FAILS_ON"*) echo "no such package"; exit 1 ;; esac ;;
    "--version ") echo "Python 3.12.0" ;;
    "-c import sys; print(sys.version)") echo "3.12.0 (stand-in)" ;;
    "-c import sys, torch"*) echo "Python 3.12.0, stand-in" ;;
esac
"""

BROKEN_SHIM = "#!/bin/sh\necho 'no version set for this shim' >&2\nexit 127\n"


class SetUp:
    """Runs the script with a PATH on which python3.11 is a broken shim and python3.12 the stand-in."""

    def __init__(self, directory: Path) -> None:
        self.venv = directory / "venv"
        self.calls = directory / "calls"
        programs = directory / "bin"
        programs.mkdir()
        for name, text in (("python3.11", BROKEN_SHIM), ("python3.12", STAND_IN)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(directory),
            "KLEAR_VENV": str(self.venv),
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


def test_a_shim_that_does_not_run_is_passed_over(set_up):
    result = set_up()
    assert result.returncode == 0, result.stderr
    assert "Python 3.12.0" in result.stdout
    assert "bin/python3.12" in result.stdout


def test_torch_comes_first_and_everything_is_constrained(set_up):
    set_up()
    installs = set_up.installs()
    assert installs[0].endswith("setuptools torch")
    assert "--editable" in installs[1]
    assert all("constraints.txt" in line for line in installs)


def test_a_second_run_does_nothing(set_up):
    set_up()
    result = set_up()
    assert "is up to date" in result.stdout
    assert set_up.installs() == []


def test_other_extras_are_installed_into_the_same_environment(set_up):
    set_up()
    result = set_up(KLEAR_EXTRAS="dev,benchmark")
    assert "there already" in result.stdout
    assert any("[dev,benchmark]" in line for line in set_up.installs())


def test_an_interrupted_set_up_is_done_again_from_the_start(set_up):
    failed = set_up(FAILS_ON="--editable")
    assert failed.returncode == 1
    assert "this step failed: 3/5" in failed.stderr
    assert "no such package" in failed.stderr
    leftover = set_up.venv / "half-installed"
    leftover.touch()
    result = set_up()
    assert "did not finish; starting over" in result.stdout
    assert result.returncode == 0
    assert not leftover.exists()
    assert len(set_up.installs()) >= 3


def test_a_missing_compiler_does_not_stop_the_set_up(set_up):
    result = set_up(FAILS_ON="pycosat")
    assert result.returncode == 0
    assert "without pycosat" in result.stdout


def test_a_directory_with_something_else_in_it_is_left_alone(set_up):
    set_up.venv.mkdir()
    (set_up.venv / "thesis.tex").write_text("years of work")
    result = set_up()
    assert result.returncode == 1
    assert "no virtual environment" in result.stderr
    assert (set_up.venv / "thesis.tex").read_text() == "years of work"


def test_an_unusable_choice_of_python_is_refused(set_up):
    result = set_up(KLEAR_PYTHON="python3.11")
    assert result.returncode == 1
    assert "KLEAR_PYTHON=python3.11 is not a Python 3.11 or 3.12" in result.stderr


def test_the_machines_torch_is_kept_on_request(set_up):
    result = set_up(KLEAR_SYSTEM_PACKAGES="1")
    assert result.returncode == 0, result.stderr
    assert any("--system-site-packages" in line for line in set_up.calls.read_text().splitlines())
    pins = (set_up.venv / "constraints.txt").read_text()
    assert "transformers==" in pins
    assert not [line for line in pins.splitlines() if line.startswith(("torch==", "numpy==", "nvidia-"))]
