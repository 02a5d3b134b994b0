"""A real Slurm of a few nodes on this machine, and jobs on it; skipped, saying why, without its packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).parent / "cluster.sh"

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.head_dim=8",
    "sft.batch_sequences=16",
    "optimizer.warmup_steps=2",
    "evaluation.at_end=false",
    "observe.tensorboard=false",
    "observe.report=false",
]
"""Overrides that shrink the quickstart's fine-tuning until a step takes milliseconds."""


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    slurm: Slurm
    number: str
    output: Path

    def fields(self) -> dict[str, str]:
        """What Slurm says of it: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.call("scontrol", "--oneliner", "show", "job", self.number)))

    def until(self, reached: Callable[[dict[str, str]], bool], seconds: float = 240.0) -> dict[str, str]:
        """Wait for something to be so; fails with the job's output after a while, or when the job ends before."""
        deadline = time.monotonic() + seconds
        while not reached(fields := self.fields()):
            over = fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not over or reached(self.fields()), f"{fields}\n{self.story()}"
            assert time.monotonic() < deadline, f"{fields}\n{self.story()}"
            time.sleep(0.1)
        return fields

    def ended(self) -> dict[str, str]:
        """Wait for the end; the state and exit status of the last attempt."""
        return self.until(lambda f: f["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"))

    def restarted(self, times: int = 1) -> None:
        """Wait until it has been requeued, and start it soon instead of in two minutes."""
        self.until(lambda f: f["Restarts"] == str(times) and f["JobState"] == "PENDING")
        # Within the second of its end a node takes the new start for the old one ("Job credential revoked").
        time.sleep(2)
        self.slurm.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def story(self) -> str:
        """All that was printed, by the job and its steps."""
        logs = sorted(self.output.parent.glob(f"*/logs/*-{self.number}-*.log"))
        return "\n".join(f"--- {p}\n{p.read_text(errors='replace')}" for p in [self.output, *logs] if p.is_file())

    def warn(self) -> None:
        """What Slurm does before the time is over."""
        self.slurm.call("scancel", "--batch", "--signal=USR1", self.number)


class Slurm:
    """A running cluster."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory, self.nodes = directory, nodes
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "KLEAR"))},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "KLEAR_VENV": sys.prefix,
        }

    def call(self, *command: str, timeout: float = 30.0, **variables: str) -> str:
        """Run one of Slurm's commands; returns its output."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | variables, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, script: str, arguments: Sequence[str], folder: Path, options: Sequence[str] = (), **variables: str
    ) -> Job:
        """`sbatch tools/SCRIPT ARGUMENTS` from the repository's root, output in `folder`."""
        number = self.call(
            "sbatch", "--parsable", f"--output={folder}/slurm-%j.out", *options, f"tools/{script}", *arguments,
            **variables,
        ).strip()  # fmt: skip
        return Job(self, number, folder / f"slurm-{number}.out")

    def preempt(self) -> Job:
        """A short job that needs all nodes and may take them from other jobs."""
        options = ["--partition=urgent", f"--nodes={self.nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        return Job(self, self.call("sbatch", "--parsable", *options).strip(), Path("/dev/null"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    with cluster(2) as made:
        yield made


@contextmanager
def cluster(nodes: int) -> Iterator[Slurm]:
    """A Slurm of so many nodes, all at this machine's address."""
    missing = subprocess.run(
        ["bash", str(CLUSTER), "missing"], check=True, capture_output=True, text=True
    ).stdout.split()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; as root: bash tests/slurm/cluster.sh install")
    # pytest's own folders are closed to others, which munge refuses.
    directory = Path(tempfile.mkdtemp(prefix="klear_slurm_"))
    try:
        subprocess.run(["bash", str(CLUSTER), "start", str(directory), str(nodes)], check=True, timeout=60)
        yield Slurm(directory, nodes)
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(directory)], check=True, timeout=90)
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's data, a little of it."""
    out = tmp_path_factory.mktemp("slurm_data") / "data"
    subprocess.run(
        [sys.executable, "examples/quickstart_data.py", "--out", str(out), "--sft-rows", "96", "--prompts", "48",
         "--heldout", "16"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def sft_arguments(data: Path) -> Callable[[Path], list[str]]:
    """Arguments of a short fine-tuning in a run directory."""

    def arguments(run: Path) -> list[str]:
        return [
            "examples/quickstart_sft.yaml",
            *TINY,
            f"run.dir={run}",
            f"tokenizer.dir={data / 'tokenizer'}",
            f"data.sft=[{data / 'sft.jsonl'}]",
            "data.heldout=[]",
            "sft.steps=150",
            "checkpoint.every_steps=50",
            "checkpoint.export_hf=true",
        ]

    return arguments


@pytest.fixture(scope="session")
def rl_arguments(data: Path) -> Callable[[Path], list[str]]:
    """Arguments of a small RL run in a run directory; how many steps it has is left to say."""

    def arguments(run: Path) -> list[str]:
        return [
            *TINY[:4],
            "optimizer.warmup_steps=0",
            "evaluation.at_end=false",
            "evaluation.every_steps=0",
            "observe.tensorboard=false",
            "observe.report=false",
            f"run.dir={run}",
            f"tokenizer.dir={data / 'tokenizer'}",
            f"data.prompts=[{data / 'prompts.jsonl'}]",
            "data.heldout=[]",
            "checkpoint.start_from=null",
            "checkpoint.every_steps=0",
            "rl.prompts_per_step=4",
            "rl.minibatch_prompts=4",
            "rollout.responses_per_prompt=2",
            "rollout.max_response_tokens=40",
            "reward.workers=1",
            "reward.malformed=-2.0",
        ]

    return arguments
