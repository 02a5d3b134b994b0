"""The trainer of benchmarks/soak.py: two ranks of a run, started again as often as they are ended."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


class Trainer:
    """The lives of one run, one after another.

    Args:
        work: directory for data, run and logs.
        overrides: settings beside examples/quickstart_rl.yaml.
        name: of the run's directory.
    """

    def __init__(self, work: Path, overrides: list[str], name: str = "run") -> None:
        self.work, self.run, self._overrides = work, work / name, [*overrides, f"run.dir={work / name}"]
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.lives = 0
        self._leaders: dict[int, psutil.Process] = {}

    def start(self, steps: int, *, file_limit: int | None = None) -> None:
        """Begin a life."""
        self.lives += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        limit = None if file_limit is None else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit,) * 2)
        self.ranks = []
        for rank in range(2):
            environment = {
                **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            }  # fmt: skip
            command = [sys.executable, "-m", "megatron_klear.train_rl", "examples/quickstart_rl.yaml"]
            with self._log(rank).open("wb") as output:
                started = subprocess.Popen(
                    [*command, *self._overrides, f"rl.steps={steps}"], cwd=ROOT, env=environment,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limit,
                )  # fmt: skip
            self.ranks.append(started)

    def _log(self, rank: int) -> Path:
        return self.work / f"{self.run.name}_life{self.lives:03d}_rank{rank}.log"

    def output(self) -> str:
        """What rank 0 has printed in this life, without the name of this machine's folder."""
        return self._log(0).read_text(errors="replace").replace(f"{self.work}/", "")

    def is_alive(self) -> bool:
        """Whether all ranks run."""
        return all(rank.poll() is None for rank in self.ranks)

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL some ranks; the others have a minute to end by themselves."""
        self.servers()
        for rank in ranks:
            self.ranks[rank].kill()
        self.wait(60.0)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses of all ranks; those that still run after the time are killed."""
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            self.servers()  # what is started meanwhile may leave something, too
            time.sleep(0.5)
        for rank in self.ranks:
            try:
                rank.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
        return [rank.wait() for rank in self.ranks]

    def step(self) -> int:
        """Newest finished step."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue  # a kill in the middle of a line
        return 0

    def servers(self) -> list[psutil.Process]:
        """Main processes of the run's servers; whatever is left of these later, `left` finds."""
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            mine = any(str(self.run) in word for word in line) and "sglang.launch_server" in line
            if mine:
                self._remember(process.pid)
            if mine and not any("supervisor.py" in word for word in line):
                found.append(process)
        children = {child.pid for process in found for child in with_children(process)[1:]}
        return [process for process in found if process.pid not in children]

    def _remember(self, pid: int) -> None:
        """A server leads a session, and so does its supervisor; all that they start stays in it, by whatever name."""
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(pid) == pid:
                self._leaders[pid] = psutil.Process(pid)

    def left(self) -> list[psutil.Process]:
        """Processes of all servers that `servers` has ever seen, supervisors included, that live."""
        self.servers()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                session = os.getsid(process.pid)
                leader = self._leaders.get(session)
                if leader is None or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if leader.is_running() or not psutil.pid_exists(session):  # else others have its number by now
                    found.append(process)
        return found


def with_children(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def left_in_peace(work: Path, overrides: list[str], steps: int) -> Trainer:
    """A run of the same settings and as many steps that nothing disturbs."""
    trainer = Trainer(work, overrides, "undisturbed")
    trainer.start(steps)
    try:
        statuses = trainer.wait(60.0 + 30.0 * steps)
    finally:
        trainer.kill([0, 1])
    if statuses != [0, 0]:
        raise SystemExit(f"the undisturbed run ended with {statuses}:\n{trainer.output()[-3000:]}")
    return trainer
