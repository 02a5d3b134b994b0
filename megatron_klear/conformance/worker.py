"""One rank of a launch: `python -m megatron_klear.conformance.worker JOB.json`, started by `launch.run_layouts`.

Runs the layouts of the job in order, in one group of processes. Every rank notes how far it came in its own file;
rank 0 writes the comparisons as JSON lines.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_klear.conformance.matrix import Comparison, Layout

Compare = Callable[..., Comparison]


def main(job_file: Path, compare: Compare | None = None) -> None:
    """Run the layouts of a job as the rank that the environment says.

    Args:
        job_file: written by `launch.run_layouts`.
        compare: what to do with each layout; `compare_layout` by default (tests put faults in).
    """
    job = json.loads(job_file.read_text())
    end_with_parent(job["parent"])
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # a launch that hangs asks every rank where it is
    # Only now the imports that take seconds and may hang on a sick machine.
    from megatron_klear import parallel

    _compare_all(job, job_file.parent, compare)
    parallel.stop()


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when the one that started it dies, so that no rank is left behind (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this rank has ended")


def _compare_all(job: dict[str, Any], directory: Path, compare: Compare | None) -> None:
    import torch

    from megatron_klear.conformance.compare import References, compare_layout

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32: it would be judged against float32
    compare = compare or compare_layout
    gc.freeze()  # modules stay; what layouts leave behind is then collected in a moment
    rank, references = int(os.environ["RANK"]), References()
    with (directory / f"progress{rank}").open("w", buffering=1) as progress, (directory / "rows").open("a") as rows:
        for number, fields in enumerate(job["layouts"]):
            progress.write(f"{number}\n")
            layout = Layout(**fields | {"lengths": tuple(fields["lengths"])})
            row = compare(layout, references, device=job["device"], timeout_seconds=job["collective_timeout_seconds"])
            if rank == 0:
                rows.write(json.dumps(asdict(row)) + "\n")
                rows.flush()
        progress.write("done\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
