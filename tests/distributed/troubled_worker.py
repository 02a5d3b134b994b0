"""A rank that gets into trouble: `troubled_worker.py TROUBLE JOB.json`. Keeps the worker's protocol, without torch."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from megatron_klear.conformance.matrix import Comparison
from megatron_klear.conformance.worker import end_with_parent

ROW = Comparison(
    label="a", processes=2, device="cpu", loss=1.0, logprobs=1.0, grads=1.0, grad_norm=1.0, updated=1.0, seconds=0.1
)


def wait_in_collective(store: Path) -> None:
    """Wait for the other rank the way torch does; its frames are recognised by their file."""
    code = "import time\ndef all_reduce():\n    time.sleep(60)\n"
    scope: dict = {}
    exec(compile(code, "/torch/distributed/distributed_c10d.py", "exec"), scope)
    scope["all_reduce"]()


def main(trouble: str, job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    rank = int(os.environ["RANK"])
    directory = job_file.parent
    if trouble != "deaf":
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    end_with_parent(job["parent"])
    (directory / f"pid{rank}").write_text(str(os.getpid()))
    if os.environ.get("TROUBLE_PIDS"):
        Path(os.environ["TROUBLE_PIDS"], str(rank)).write_text(str(os.getpid()))
    if trouble == "early":
        sys.exit("no such library")
    (directory / f"progress{rank}").write_text("0\n")
    if rank == 0:
        with (directory / "rows").open("w") as rows:
            rows.write(json.dumps(asdict(ROW)) + "\n")
    (directory / f"progress{rank}").write_text("0\n1\n")
    print(f"rank {rank} says something", flush=True)
    if trouble == "silent":
        return
    if rank == 0:
        wait_in_collective(directory)
    if trouble == "raise":
        raise RuntimeError("the sum is wrong")
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
