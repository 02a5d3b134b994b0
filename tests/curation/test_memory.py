"""Memory does not grow with the input: ten times the rows take what the rows take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.curation_inputs import BENCHMARKS, write_inputs

GROWTH_MEBIBYTES = 16
"""What ten times the input may add.

Buffers are full in both runs (1 Mi characters of rows in a batch, as much in a writer, a Parquet batch of 1 MiB). What
can grow is SQLite's pages of keys (here 6,000 rows of about 100 bytes, well below its bound of 64 MiB), the manifests
of units, and what the allocators do not give back of buffers that were freed and taken again.
"""

PEAK = """
import resource, sys
from megatron_klear.curate import run
status = run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
raise SystemExit(status)
"""


def peak_mebibytes(directory: Path, documents: int) -> tuple[float, float]:
    """Peak memory of a run and the size of its input, both in MiB."""
    directory.mkdir()
    write_inputs(directory, documents, words=1200, seed=3, files=1)
    settings = {
        "run": {"dir": str(directory / "run"), "task": "rl", "stages": ["dedup", "decontaminate"]},
        "input": {"files": [str(directory / "input-*.jsonl")], "check_references": False},
        "decontamination": {"benchmarks": [str(directory / f"{name}.jsonl") for name in BENCHMARKS]},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(directory / "config.yaml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((directory / "run" / "audit.json").read_text())["stages"][0]["rows_in"] == documents
    size = sum(file.stat().st_size for file in directory.glob("input-*.jsonl"))
    return int(done.stdout.split("peak ")[1]) / 1024, size / 2**20


def test_ten_times_the_input_takes_no_more_memory(tmp_path: Path) -> None:
    small, small_input = peak_mebibytes(tmp_path / "small", 600)
    large, large_input = peak_mebibytes(tmp_path / "large", 6000)
    assert large_input - small_input > 3 * GROWTH_MEBIBYTES  # so that holding the input would show
    assert large - small < GROWTH_MEBIBYTES


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    long = tmp_path / "long.jsonl"
    with long.open("wb") as file:
        for _ in range(20):
            file.write(b'{"id": "' + b"x" * (8 << 20) + b'"}\n')
        file.write(json.dumps({"id": "a", "domain": "math", "messages": [{"role": "user", "content": "?"}]}).encode())
    config = write_config(
        [], task="sft", stages=("dedup",), input={"files": [str(long)], "max_reject_share": 1.0, "max_row_bytes": 4096}
    )
    done = subprocess.run([sys.executable, "-c", PEAK, str(config)], capture_output=True, text=True, timeout=100)
    assert "no row is left after the stage export" in done.stderr
    assert done.returncode == 2
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == list(range(1, 21))
