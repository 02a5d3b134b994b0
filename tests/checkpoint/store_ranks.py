"""Real gloo processes for the checkpoint tests, forked from one that has imported everything.

Usage: python store_ranks.py, then one JSON line per launch on standard input:
{"directory": ..., "layouts": {"world": 2, "tp": 1, ...}, "steps": [["update", 1], ["save", 1]], ...}
Rank r writes directory/rank{r}.json: for every step what `Rank` returned, or {"error": text} of a CheckpointError.
With "kill": [rank, seconds] that rank is killed so long after the first "save" began.
The answer is one JSON line: exit codes and how long the last rank lived after the first had ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402  (Megatron warns on import)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_klear import parallel  # noqa: E402
from megatron_klear.algorithm import PolicyObjective  # noqa: E402
from megatron_klear.checkpoint import CheckpointStore, layout, load_weights  # noqa: E402
from megatron_klear.config import (  # noqa: E402
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
    resolve_architecture,
)
from megatron_klear.errors import CheckpointError  # noqa: E402
from megatron_klear.model import build_qwen3, hf_named_tensors  # noqa: E402
from megatron_klear.trainer import Trainer, make_trainable, sft_minibatch  # noqa: E402

MODEL: dict[str, Any] = {
    "preset": "qwen3-tiny",
    "vocab_size": 300,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rope_theta": 5e4,
    "tie_embeddings": False,
    "dtype": "float32",
}
"""As small as possible, and as conftest.py's Hugging Face directories."""


class Rank:
    """What one rank can be told to do; every method takes JSON and returns JSON."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.directory = Path(job["directory"])
        self.updates = 0
        sizes = {name: value for name, value in job["layout"].items() if name != "world"}
        self.parallel = ParallelSettings(**sizes, timeout_seconds=60)
        self.context = parallel.start(self.parallel)
        self.warnings: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("megatron_klear").addHandler(handler)
        self.fresh(job["root"])

    def fresh(self, root: str, model: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None) -> None:
        """Begin anew, with other weights than any other run, on a checkpoints directory."""
        settings = ModelSettings(**{**MODEL, **self.job.get("model", {}), **(model or {})})
        self.arch = resolve_architecture(settings)
        torch.manual_seed(int.from_bytes(os.urandom(4), "big") if self.job.get("random_start", True) else 5)
        self.model = build_qwen3(self.arch, settings, self.parallel, self.context)
        self.root, self.optimizer_settings = Path(root), optimizer or {}
        self.trainer = None  # made when first needed: weights can be loaded before

    def _make(self) -> Trainer:
        if self.trainer is None:
            schedule: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_steps": 2}
            trainable = make_trainable(
                self.model,
                OptimizerSettings(**{**schedule, **self.optimizer_settings}),
                self.parallel,
                total_updates=12,
            )
            settings = Settings(
                run=RunSettings(dir="unused"),
                tokenizer=TokenizerSettings(dir="unused"),
                parallel=self.parallel,
                packing=PackingSettings(token_budget=48),
            )
            self.trainer = Trainer(trainable, self.arch, settings, self.context)
            self.store = CheckpointStore(
                self.root,
                ddp=trainable.ddp,
                optimizer=trainable.optimizer,
                schedule=trainable.schedule,
                context=self.context,
                keep=self.job.get("keep", 3),
                settings_yaml="model: {}\n",
            )
        return self.trainer

    def update(self, step: int) -> dict[str, float]:
        """An optimizer update on data that depend on the step alone; noise from torch's generator goes in as well."""
        generator = np.random.default_rng(step)
        rows = []
        for name in range(4):
            ids = generator.integers(0, MODEL["vocab_size"], size=generator.integers(4, 20))
            rows.append((f"{step}-{name}", ids, np.arange(len(ids)) > 0))
        trainer = self._make()
        report = trainer.update(sft_minibatch(rows), PolicyObjective("gppo"), step=step)
        self.updates = step
        return {"loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr, "noise": float(torch.rand(()))}

    def save(self, step: int) -> list[int]:
        """Save; returns the steps that there are then."""
        self._make()
        (self.directory / "saving").touch()
        self.store.save(step, {"step": step, "cursor": {"epoch": 3, "place": [step]}})
        (self.directory / f"saved_{step}").touch()
        return layout.finished_steps(self.root)

    def resume(self) -> Any:
        """Resume; returns the run's state."""
        self._make()
        state = self.store.resume()
        self.updates = 0 if state is None else state["step"]
        return state

    def run(self, last: int) -> None:
        """Update and save until the last step."""
        for step in range(self.updates + 1, last + 1):
            self.update(step)
            self.save(step)

    def weights(self) -> dict[str, str]:
        """Digest of every weight, whole and in Hugging Face's names."""
        return {
            name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            for name, t in hf_named_tensors(self.model, self.arch, self.context)
        }

    def keep_weights(self, name: str) -> None:
        """Store all weights for the test to compare."""
        tensors = {name: t.detach().clone() for name, t in hf_named_tensors(self.model, self.arch, self.context)}
        if self.context.world.rank == 0:
            torch.save(tensors, self.directory / name)

    def load_weights(self, directory: str) -> str:
        """Load weights into the bare model; returns the checkpoint that was read."""
        return str(load_weights(Path(directory), self.model, self.context))

    def limit_files(self, rank: int, num_bytes: int) -> None:
        """From now on no file that this rank writes can be larger: the system refuses it, as on a full disk."""
        if self.context.world.rank == rank:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes if num_bytes >= 0 else hard, hard))

    def report_full(self, rank: int, free: int | None) -> None:
        """Let this rank believe that its disk has so many bytes left."""
        usage = namedtuple("usage", "total used free")
        if self.context.world.rank == rank:
            shutil.disk_usage = _DISK_USAGE if free is None else (lambda _: usage(10**12, 0, free))  # type: ignore

    def hide_directory(self, rank: int) -> None:
        """Let this rank see none of the others' files, as without shared storage."""
        if self.context.world.rank == rank:
            listed = os.listdir
            layout.os = SimpleNamespace(listdir=lambda path: [name for name in listed(path) if "writing" not in name])

    def files(self) -> list[str]:
        """What lies in the checkpoints directory."""
        found = sorted(os.listdir(self.root))
        dist.barrier()  # before anyone writes again
        return found

    def take_warnings(self) -> list[str]:
        """Messages logged since the last time."""
        found, self.warnings = self.warnings, []
        return found

    def world_stays_together(self) -> int:
        """Whether the ranks still understand one another after a failure."""
        total = torch.ones(())
        dist.all_reduce(total)
        return int(total)


_DISK_USAGE = shutil.disk_usage


def work(job: dict[str, Any], rank: int) -> None:
    """The life of a rank."""
    directory, world = Path(job["directory"]), job["layout"]["world"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    actor, answers = Rank(job), []
    for name, *arguments in job["steps"]:
        try:
            answers.append(getattr(actor, name)(*arguments))
        except CheckpointError as error:
            answers.append({"error": str(error)})
    (directory / f"rank{rank}.json").write_text(json.dumps(answers))
    dist.barrier()


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, kill one if asked to, and wait for them."""
    directory, codes, pids = Path(job["directory"]), {}, {}
    for rank in range(job["layout"]["world"]):
        pid = os.fork()
        if pid:
            pids[pid] = rank
            continue
        log = os.open(directory / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        with contextlib.suppress(BaseException):
            try:
                work(job, rank)
                status = 0
            except BaseException:
                traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    start, first_end, kill = time.monotonic(), None, job.get("kill")
    saving = None
    while pids and time.monotonic() < start + job.get("seconds", 90):
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
                first_end = first_end or time.monotonic()
        if kill and saving is None and (directory / "saving").exists():
            saving = time.monotonic()
        if kill and saving is not None and time.monotonic() >= saving + kill[1]:
            for pid in [p for p, rank in pids.items() if rank == kill[0]]:
                os.kill(pid, signal.SIGKILL)
            kill = None
        time.sleep(0.002)
    for pid, rank in pids.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = "hung"
    after = 0.0 if first_end is None else time.monotonic() - first_end
    return {"codes": [codes[rank] for rank in sorted(codes)], "after": after}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), flush=True)
    os._exit(0)  # taking all the modules down again would need seconds
