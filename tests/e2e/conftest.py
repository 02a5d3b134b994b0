"""Small runs of the real entries in real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.head_dim=8",
    "evaluation.prompts=8",
    "reward.workers=2",
    "observe.tensorboard=false",
    "observe.report=false",
]
"""Overrides that shrink the quickstart's configs until a step takes milliseconds."""


@dataclass
class Launch:
    """One launch of an entry on several ranks, output collected per rank."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Exit statuses of all ranks; ranks that outlive the limit are killed and fail the test."""
        deadline = self.started + timeout
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            pytest.fail(f"still running after {timeout} s:\n{self.output()}")

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def output(self) -> str:
        return "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


Start = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start an entry: `start("train_sft", config, [overrides], ranks=2)`, or a script by its path.

    With `hosts` every rank is a machine of its own, whose servers listen on its address of these.
    Whatever is left is killed at the end.
    """
    launches: list[Launch] = []

    def launch(
        entry: str,
        config: str | Path,
        overrides: Sequence[str] = (),
        *,
        ranks: int = 2,
        hosts: Sequence[str] = (),
    ) -> Launch:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program = [entry] if entry.endswith(".py") else ["-m", f"megatron_klear.{entry}"]
        processes, logs = [], []
        for rank in range(ranks):
            log = tmp_path / f"launch{len(launches)}_rank{rank}.log"
            environment = {
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": "0" if hosts else str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": "1" if hosts else str(ranks),
            }
            place = [f"sglang.host={hosts[rank]}"] if hosts else []
            with log.open("wb") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *program, str(config), *overrides, *place],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
            logs.append(log)
        launches.append(Launch(processes, logs))
        return launches[-1]

    yield launch
    for one in launches:
        one.signal(signal.SIGKILL)
        for process in one.processes:
            process.wait()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's data, a little of it."""
    out = tmp_path_factory.mktemp("quickstart") / "data"
    subprocess.run(
        [sys.executable, "examples/quickstart_data.py", "--out", str(out), "--sft-rows", "96", "--prompts", "48",
         "--heldout", "16"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return out


@pytest.fixture
def sft_overrides(data: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides of quickstart_sft.yaml for a run named in the argument."""

    def overrides(name: str) -> list[str]:
        return [
            *TINY,
            f"run.dir={tmp_path / name}",
            f"tokenizer.dir={data / 'tokenizer'}",
            f"data.sft=[{data / 'sft.jsonl'}]",
            f"data.heldout=[{data / 'heldout.jsonl'}]",
            "sft.batch_sequences=16",
            "optimizer.warmup_steps=2",
        ]

    return overrides


@pytest.fixture(scope="session")
def fine_tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model answers in the right form now and then, so that rewards differ and RL has a gradient."""
    run = tmp_path_factory.mktemp("fine_tuned") / "run"
    subprocess.run(
        [sys.executable, "-m", "megatron_klear.train_sft", "examples/quickstart_sft.yaml", *TINY, f"run.dir={run}",
         f"tokenizer.dir={data / 'tokenizer'}", f"data.sft=[{data / 'sft.jsonl'}]",
         f"data.heldout=[{data / 'heldout.jsonl'}]", "sft.batch_sequences=16", "sft.steps=60", "optimizer.lr=1.0e-2",
         "optimizer.warmup_steps=2", "checkpoint.every_steps=0", "evaluation.at_end=false"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        check=True, capture_output=True,
    )  # fmt: skip
    return run


@pytest.fixture
def rl_overrides(data: Path, fine_tuned: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides of quickstart_rl.yaml for a run named in the argument."""

    def overrides(name: str) -> list[str]:
        return [
            *TINY,
            f"run.dir={tmp_path / name}",
            f"tokenizer.dir={data / 'tokenizer'}",
            f"data.prompts=[{data / 'prompts.jsonl'}]",
            f"data.heldout=[{data / 'heldout.jsonl'}]",
            f"checkpoint.start_from={fine_tuned}",
            "rl.prompts_per_step=8",
            "rl.minibatch_prompts=4",
            "rollout.responses_per_prompt=4",
            "rollout.max_response_tokens=40",
            "evaluation.max_response_tokens=40",
            "optimizer.warmup_steps=0",
            # So small a model is hardly ever right; what it can learn is to answer in the right form.
            "reward.malformed=-2.0",
        ]

    return overrides


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Overrides that start stand-ins for servers, with faults."""
    program = Path(__file__).with_name("stand_in_server.py")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S {program} "$@"\n')
    python.chmod(0o755)

    def make(*faults: str) -> list[str]:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        for fault in faults:
            (directory / fault).touch()
        monkeypatch.setenv("STAND_IN_FAULTS", str(directory))
        return ["rollout.engine=sglang", f"sglang.venv={tmp_path / 'venv'}", "correction.stop_above_mean=null"]

    return make
