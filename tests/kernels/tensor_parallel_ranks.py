"""Starts the ranks of a tensor-parallel test over gloo and collects what they saved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def run_ranks(directory: Path, world_size: int, *, worker: Path = WORKER, **environment: str) -> list[dict[str, Any]]:
    """Run the worker on every rank and return what each saved; a rank that fails ends the others.

    Args:
        directory: empty; takes logs and results.
        world_size: number of ranks.
        worker: script, called with rank, world size and directory.
        environment: variables set for the ranks.
    """
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **environment,
    }
    processes, logs = [], [directory / f"rank{rank}.log" for rank in range(world_size)]
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), str(rank), str(world_size), str(directory)]
        with log.open("w") as stream:
            processes.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 180
    try:
        while any(process.poll() is None for process in processes):
            # A rank that failed leaves the other waiting in an exchange.
            assert not any(process.poll() for process in processes), "\n".join(log.read_text() for log in logs)
            assert time.monotonic() < deadline, "\n".join(["timed out", *(log.read_text() for log in logs)])
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(log.read_text() for log in logs)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
