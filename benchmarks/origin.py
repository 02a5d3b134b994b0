"""When, where and with what a result was made; kept with it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def origin(venv: Path | None = None) -> dict[str, object]:
    """Facts for a result; ask before the work begins, for the load is then that of others.

    Args:
        venv: SGLang's environment, for a result with real servers.
    """
    served = {} if venv is None else _versions_of_servers(venv)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        ),
        **served,
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def _versions_of_servers(venv: Path) -> dict[str, str]:
    asked = "import importlib.metadata as m; print(m.version('sglang'), m.version('torch'))"
    sglang, torch = subprocess.run(
        [str(venv / "bin" / "python"), "-c", asked], check=True, capture_output=True, text=True
    ).stdout.split()
    return {"sglang": sglang, "torch_of_sglang": torch}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
