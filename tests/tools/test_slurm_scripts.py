"""The job scripts without a Slurm: what they say to a person, and shellcheck where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("sft.slurm", "gppo.slurm")
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def run(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: sbatch [SBATCH OPTIONS] tools/{script} CONFIG.yaml")
    for words in ("#SBATCH --signal=B:USR1@", "#SBATCH --requeue", "##SBATCH --gpus-per-node", "run.dir/logs"):
        assert words in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments", [(), ("optimizer.lr=1",), ("--nodes=2", "a.yaml")])
def test_missing_config_is_refused(script, arguments):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert "CONFIG.yaml: the settings file must come first" in done.stderr
    assert "usage: sbatch" in done.stderr


def test_outside_a_job_it_says_how_to_submit():
    done = run("sft.slurm", "a.yaml")
    assert done.returncode == 2
    assert "not a Slurm job" in done.stderr


def test_submitted_from_elsewhere_it_says_from_where(tmp_path):
    done = run("gppo.slurm", "a.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "submit from the root of the repository" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [*ROOT.glob("tools/*.slurm"), *ROOT.glob("tools/slurm_*.sh"), *ROOT.glob("tests/slurm/*.sh")]
    assert len(scripts) == 5
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
