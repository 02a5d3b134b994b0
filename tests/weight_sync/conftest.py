"""Two ranks of a trainer that publish to a real server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("publish_worker.py")

Publish = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def publish(sglang_urls: dict[str, str], tmp_path: Path) -> Publish:
    """Run a job of `publish_worker.py` on two ranks; returns one result per action."""

    def run(actions: list[dict[str, Any]], *, dtype: str = "float32", tp: int = 1, pp: int = 1) -> list[dict[str, Any]]:
        job, result = tmp_path / "job.json", tmp_path / "result.json"
        job.write_text(
            json.dumps(
                {
                    "url": sglang_urls[dtype],
                    "dtype": dtype,
                    "tp": tp,
                    "pp": pp,
                    "tied": False,
                    "directory": str(tmp_path / "weights"),
                    "result": str(result),
                    "actions": actions,
                }
            )
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Files and not pipes: torch's manager of shared memory inherits them and may outlive the ranks.
        logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(WORKER), str(job)],
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                },
                stdin=subprocess.DEVNULL,
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [rank.wait(timeout=280) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0, 0], "\n---\n".join(log.read_text(errors="replace") for log in logs)
        return json.loads(result.read_text())

    return run
