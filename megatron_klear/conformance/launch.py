"""Starts the ranks of a launch, collects their comparisons, and says which rank is to blame when they fail.

The starting process keeps the store at which the ranks meet, on a loopback port that the system picks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_klear.conformance.matrix import GPU_ONLY_LAYOUTS, LAYOUTS, Comparison, Layout

WORKER = ("-m", "megatron_klear.conformance.worker")
_GRACE_SECONDS = 5.0
"""After one rank has failed, the others fail too for want of it; those that do not, hang."""
_LOG_LINES = 25
_STACK_FRAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Layouts to run together in one group of processes.

    Attributes:
        processes: ranks.
        device: `cpu` or `cuda`.
        layouts: in order.
    """

    processes: int
    device: str
    layouts: tuple[Layout, ...]


def plan_launches(
    processes: Sequence[int], device: str, *, num_gpus: int, transformer_engine: bool
) -> tuple[Launch, ...]:
    """What to launch on a machine.

    Args:
        processes: numbers of ranks asked for, each a key of `LAYOUTS`.
        device: `cpu`, `cuda`, or `auto`: several ranks use GPUs where there is one for each, and one rank runs on the
            CPU and on a GPU.
        num_gpus: GPUs of the machine.
        transformer_engine: whether it is installed.
    """
    launches = []
    for count in processes:
        if device != "cuda" and (device == "cpu" or count == 1 or num_gpus < count):
            launches.append(Launch(processes=count, device="cpu", layouts=LAYOUTS[count]))
        if device != "cpu" and num_gpus >= count:
            further = GPU_ONLY_LAYOUTS[count] if transformer_engine else ()
            launches.append(Launch(processes=count, device="cuda", layouts=(*LAYOUTS[count], *further)))
    return tuple(launches)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """What came of a launch.

    Attributes:
        rows: one comparison per layout, in order, as far as the ranks got.
        failure: None, or a text for people: which rank failed or hung, where, and the end of its log.
    """

    rows: tuple[Comparison, ...]
    failure: str | None


def run_layouts(
    layouts: Sequence[Layout],
    processes: int,
    *,
    device: str = "cpu",
    timeout_seconds: float = 600.0,
    on_row: Callable[[Comparison], None] | None = None,
    worker: Sequence[str] = WORKER,
) -> LaunchResult:
    """Run layouts on so many processes, started for it and ended before this returns, whatever happens.

    Args:
        layouts: what to run, in order.
        processes: ranks to start.
        device: `cpu` (GPUs are hidden from the ranks) or `cuda` (one GPU per rank).
        timeout_seconds: for the whole launch.
        on_row: called with every comparison as it comes.
        worker: arguments of Python that start a rank; the job file is added.
    """
    with tempfile.TemporaryDirectory(prefix="klear_conformance_") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        job = directory / "job.json"
        job.write_text(
            json.dumps(
                {
                    "layouts": [asdict(layout) for layout in layouts],
                    "device": device,
                    "parent": os.getpid(),
                    # Well before the launch gives up: the rank that others wait for is then the one that still runs.
                    "collective_timeout_seconds": min(120.0, timeout_seconds / 2),
                }
            )
        )
        port = stack.enter_context(_meeting_point())
        ranks = [stack.enter_context(_rank(rank, processes, port, device, job, worker)) for rank in range(processes)]
        launch = _Launch(ranks, directory, layouts, processes, on_row or (lambda row: None))
        failure = launch.wait(timeout_seconds)
        return LaunchResult(rows=tuple(launch.rows), failure=failure)


@contextlib.contextmanager
def _meeting_point() -> Iterator[int]:
    """A store that ranks find each other at, as torchrun's agent keeps one; yields its port."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@contextlib.contextmanager
def _rank(
    rank: int, processes: int, port: int, device: str, job: Path, worker: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        **_environment(rank, processes, port, device),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    with (job.parent / f"log{rank}").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *worker, str(job)], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment(rank: int, processes: int, port: int, device: str) -> Mapping[str, str]:
    """What torchrun would set, one thread per rank, and traffic kept on the loopback interface."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


class _Launch:
    """Watches the ranks of one launch.

    Args:
        ranks: the processes, by rank.
        directory: where they write.
        layouts: what they run.
        processes: how many they are.
        on_row: called with every comparison.
    """

    def __init__(
        self,
        ranks: Sequence[subprocess.Popen[bytes]],
        directory: Path,
        layouts: Sequence[Layout],
        processes: int,
        on_row: Callable[[Comparison], None],
    ) -> None:
        self.ranks, self.directory, self.on_row = ranks, directory, on_row
        self.labels = [layout.label(processes) for layout in layouts]
        self.rows: list[Comparison] = []

    def wait(self, timeout_seconds: float) -> str | None:
        """Wait for all ranks; returns what went wrong, or None."""
        deadline = time.monotonic() + timeout_seconds
        first_failed: int | None = None
        while any(rank.poll() is None for rank in self.ranks):
            self._read_rows()
            failed = [number for number, rank in enumerate(self.ranks) if rank.poll()]
            if failed and first_failed is None:
                first_failed, deadline = failed[0], min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._read_rows()
        hanging = [number for number, rank in enumerate(self.ranks) if rank.poll() is None]
        failed = [number for number, rank in enumerate(self.ranks) if rank.poll()]
        if hanging:
            return self._describe_hanging(hanging, failed, timeout_seconds)
        if failed:
            blamed = failed[0] if first_failed is None else first_failed
            return f"{self._end_of(blamed)} {self._place(blamed)}. The end of its log:\n{self._log(blamed)}"
        missing = len(self.labels) - len(self.rows)
        return f"every rank ended well, but comparisons are missing: {missing}" if missing else None

    def _read_rows(self) -> None:
        written = self.directory / "rows"
        lines = written.read_text().splitlines(keepends=True) if written.exists() else []
        for line in lines[len(self.rows) :]:
            if line.endswith("\n"):
                self.rows.append(Comparison(**json.loads(line)))
                self.on_row(self.rows[-1])

    def _describe_hanging(self, hanging: list[int], failed: list[int], timeout_seconds: float) -> str:
        """Ask the ranks that still run where they are, and name those that others wait for."""
        for number in hanging:
            self.ranks[number].send_signal(signal.SIGUSR1)
        time.sleep(1.0)
        stacks = {number: self._stack(number) for number in hanging}
        blamed = [number for number in hanging if not _waits_for_others(stacks[number])]
        if failed:
            reason = "; ".join(f"{self._end_of(number)} {self._place(number)}" for number in failed)
        else:
            reason = f"not done after {timeout_seconds:g} s"
            blamed = blamed or hanging  # all wait for one another: each is as suspect as the next
        silent = f" Did not report: {_ranks(blamed)} ({self._place(blamed[0])})." if blamed else ""
        lines = [f"{reason}.{silent}"]
        for number in hanging:
            lines += [f"Rank {number} is at:", stacks[number] or "  (it does not answer)"]
        lines += [text for number in failed for text in (f"The end of the log of rank {number}:", self._log(number))]
        return "\n".join(lines)

    def _stack(self, number: int) -> str:
        """Innermost frames that a rank wrote when asked, the last first."""
        text = (self.directory / f"log{number}").read_text(errors="replace")
        _, asked, frames = text.rpartition("(most recent call first):\n")
        return "\n".join(frames.splitlines()[:_STACK_FRAMES]) if asked else ""

    def _end_of(self, number: int) -> str:
        status = self.ranks[number].returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        return f"rank {number} {how}"

    def _place(self, number: int) -> str:
        """How far a rank came, as a phrase."""
        progress = self.directory / f"progress{number}"
        steps = progress.read_text().split() if progress.exists() else []
        if not steps:
            return "before its first layout"
        return "after its last layout" if steps[-1] == "done" else f"in layout '{self.labels[int(steps[-1])]}'"

    def _log(self, number: int) -> str:
        lines = (self.directory / f"log{number}").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])


def _waits_for_others(stack: str) -> bool:
    innermost = "\n".join(stack.splitlines()[:4])
    return "distributed_c10d.py" in innermost or "p2p_communication.py" in innermost


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
