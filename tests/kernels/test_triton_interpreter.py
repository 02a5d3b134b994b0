"""Runs the tests of Triton kernels on CPU tensors, in processes where Triton was told to interpret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(
    path.name for path in HERE.glob("test_*.py") if "triton_device: " in path.read_text() and path != Path(__file__)
)


def test_there_are_such_files() -> None:
    assert {"test_linear_logprob_triton.py", "test_linear_policy_loss_triton.py"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_passes_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", str(HERE / name)]
    result = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    summary = result.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary), summary
    assert not re.search(r"skipped|xfailed|error", summary), summary
