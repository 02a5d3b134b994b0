"""Tokens per second of SFT, and seconds of an RL step, of this project against TRL on the same CPU cores.

    pip install -c constraints.txt -e .[benchmark]
    python benchmarks/cpu_vs_trl.py [--tasks sft rl] [--rounds 7] [--block 4] [--out FILE]

Both sides train the same small random Qwen3 (made here) on the same sequences in the same order, in float32 with
AdamW, clipping and no recomputation, with as many threads in all as `--cores`: this project as one data-parallel
gloo process per core, TRL as one process with all threads and as one process per core, padded and padding-free. The best
of TRL's ways is what this project is compared with. All are started before the first is timed, and then take turns
within a round, block by block, while the others wait, so that a busy machine slows all of them. The first step is
a warm-up in which both sides' losses must agree.

An RL step is: 8 responses to each of 8 prompts, rewards, old logprobs, 4 optimizer updates of the clipped objective,
and the new weights in use for generation. Its tokens are those of the responses. Memory is the sum over a
contestant's processes of the largest resident set, libraries included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpu_vs_trl_inputs import Workload, make_inputs

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("cpu_vs_trl_contestants.py")
LOSS_AGREEMENT = 1e-3
"""Largest relative difference between the losses of the first step; a benchmark of wrong numbers is worthless."""
AIM = 1.2
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "megatron-core", "numpy")


@dataclass(kw_only=True)
class Contestant:
    """One way to train: its processes, and how long its blocks of steps took."""

    name: str
    side: str
    processes: int
    threads: int
    options: dict[str, Any]
    running: list[tuple[subprocess.Popen[bytes], int, int]] = field(default_factory=list)
    unread: dict[int, bytes] = field(default_factory=dict)
    blocks: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)

    def start(self, task: str, inputs: Path, seconds: float) -> None:
        """Start the processes and wait for their first step.

        Raises:
            SystemExit: they ended or took too long.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.processes):
            commands_read, commands_write = os.pipe()
            answers_read, answers_write = os.pipe()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                "MKL_NUM_THREADS": str(self.threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(WORKER.parent)]),
            }
            if self.processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                environment |= {"LOCAL_WORLD_SIZE": str(self.processes)}
            options = json.dumps({"threads": self.threads, **self.options})
            log = (inputs / f"{self.name.replace(' ', '_')}_{rank}.log").open("w")
            process = subprocess.Popen(
                [sys.executable, WORKER, self.side, task, inputs, options, str(commands_read), str(answers_write)],
                env=environment,
                pass_fds=(commands_read, answers_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            os.close(commands_read)
            os.close(answers_write)
            self.running.append((process, commands_write, answers_read))
        self.first = self._answers(seconds, inputs)

    def run(self, steps: int, seconds: float, inputs: Path) -> None:
        """Do a block of steps and note what it took."""
        for _, commands, _ in self.running:
            os.write(commands, f"{steps}\n".encode())
        self.blocks.append({**self._answers(seconds, inputs), "steps": steps})

    def _answers(self, seconds: float, inputs: Path) -> dict[str, float]:
        answers = []
        for rank, (_, _, readable) in enumerate(self.running):
            text = b""
            while not text.endswith(b"\n"):
                found = os.read(readable, 65536) if select.select([readable], [], [], seconds)[0] else b""
                if not found:
                    log = (inputs / f"{self.name.replace(' ', '_')}_{rank}.log").read_text()[-3000:]
                    raise SystemExit(f"{self.name}: process {rank} gave no answer\n{log}")
                text += found
            answers.append(json.loads(text))
        merged = dict(answers[0])
        merged["seconds"] = max(a["seconds"] for a in answers)
        for summed in ("processor_seconds", "peak_rss_mib", "tokens"):
            merged[summed] = sum(a[summed] for a in answers)
        merged["loss"] = statistics.fmean(a.get("loss", 0.0) for a in answers)
        return merged

    def stop(self) -> None:
        """End the processes."""
        for process, commands, answers in self.running:
            os.close(commands)
            os.close(answers)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running = []

    def median(self, what: str) -> float:
        """Median over blocks of seconds per step, or tokens per second."""
        if what == "seconds":
            return statistics.median(b["seconds"] / b["steps"] for b in self.blocks)
        return statistics.median(b["tokens"] / b["seconds"] for b in self.blocks)


def contestants(task: str, cores: int) -> list[Contestant]:
    """This project first, then TRL's ways."""
    ours = Contestant(name="ours", side="ours", processes=cores, threads=1, options={"token_budget": 2048})
    ways: list[tuple[str, int, dict[str, Any]]]
    if task == "sft":
        ways = [
            ("trl padded", 1, {"batch": 4, "padding_free": False}),
            ("trl padding-free", 1, {"batch": 4, "padding_free": True}),
            ("trl padding-free", cores, {"batch": 4, "padding_free": True}),
        ]
    else:
        ways = [("trl", 1, {"batch": 16}), ("trl", cores, {"batch": 16})]
    return [
        ours,
        *(
            Contestant(name=f"{name} {n}x{cores // n}", side="trl", processes=n, threads=cores // n, options=options)
            for name, n, options in ways
        ),
    ]
