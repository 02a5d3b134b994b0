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


@pytest.fixture(scope="session")
def publish(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Publish:
    """Run a job of `publish_worker.py` on two ranks; returns one result per action.

    Without a URL it publishes to the server that all tests share.
    """

    def started(dtype: str) -> str:
        return request.getfixturevalue("sglang_urls")[dtype]

    def run(
        actions: list[dict[str, Any]],
        *,
        dtype: str = "float32",
        tp: int = 1,
        pp: int = 1,
        url: str | None = None,
        server_tp: int = 1,
    ) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("publish")
        job, result = folder / "job.json", folder / "result.json"
        settings = {"url": url or started(dtype), "server_tp": server_tp, "dtype": dtype, "tp": tp, "pp": pp}
        job.write_text(
            json.dumps({**settings, "actions": actions, "directory": str(folder / "weights"), "result": str(result)})
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment = {
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(probe.getsockname()[1]),
                "WORLD_SIZE": "2",
            }
        # Files and not pipes: torch's manager of shared memory inherits them and may outlive the ranks.
        logs = [folder / f"rank{rank}.log" for rank in range(2)]
        ranks = [_start(job, log, {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r, log in enumerate(logs)]
        try:
            codes = [rank.wait(timeout=280) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0, 0], "\n---\n".join(log.read_text(errors="replace") for log in logs)
        return json.loads(result.read_text())

    return run


def _start(job: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(job)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
