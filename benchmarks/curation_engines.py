"""The same units of curation by every engine that could take them past one machine: Ray Data and datatrove.

    python benchmarks/curation_engines.py [--documents 20000] [--rows-per-file 500] [--workers 2] [--rounds 3]

Needs the extras ray and benchmark-curation (datatrove). All do the units of the stage decontaminate with two
workers on this machine; seconds are by the clock, the start of workers included, in interleaved rounds. Then a worker
ends while it has a unit, as one does that the kernel kills for its memory: does the engine finish all units?
datatrove's Slurm executor starts a process for each task, which is its own entry for array jobs; it is run here in the
same way, by hand, without Slurm's own waiting.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from curation_inputs import BENCHMARKS, write_inputs

from megatron_klear.curation import engines
from megatron_klear.curation.engines import Task

RESULT = Path(__file__).with_name("results") / "curation_engines.json"
PATIENCE = 30.0
"""An engine with a dead worker is taken to hang after this many seconds, and three times those of a sound run."""


def prepare(directory: Path, documents: int, rows_per_file: int, workers: int) -> list[Task]:
    """Curate once in one process and keep the units of the stage decontaminate."""
    write_inputs(directory, documents, words=120, seed=3)
    settings = {
        "run": {"dir": str(directory / "run"), "task": "rl", "stages": ["dedup", "decontaminate"],
                "rows_per_file": rows_per_file, "progress": False},
        "input": {"files": [str(directory / "input-*.jsonl")], "check_references": False},
        "decontamination": {"benchmarks": [str(directory / f"{name}.jsonl") for name in BENCHMARKS]},
    }  # fmt: skip
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    from megatron_klear.config.curation import load_curation_settings
    from megatron_klear.curation import curate

    found: list[Task] = []
    work = engines.work

    def noting(stage: Any, jobs: Any, settings: Any, fingerprint: str, advance: Any) -> Any:
        if stage.name == "decontaminate":
            found.extend(Task(stage=stage.name, fingerprint=fingerprint, settings=settings, job=job) for job in jobs)
        return work(stage, jobs, settings, fingerprint, advance)

    with mock.patch("megatron_klear.curation.pipeline.work", noting):
        curate(load_curation_settings(directory / "config.yaml", [f"run.workers={workers}"]))
    return found


class Units:
    """A step of datatrove's pipelines: the units of one task."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do every `world_size`-th unit from `rank` on; yields no documents of datatrove's own kind."""
        for task in pickle.loads(Path(self._file).read_bytes())[rank::world_size]:
            die_once(task)
            engines.do_task(task)
        yield from ()


def die_once(task: Task) -> None:
    """End this process, without a word, where a file asks for it; the file goes, so that a second try lives."""
    victim = os.environ.get("KLEAR_BENCHMARK_VICTIM")
    if victim and task.job.number == 1 and os.path.exists(victim):
        os.unlink(victim)
        os._exit(9)


class Mortal:
    """A unit whose arrival in another process may end that process; there it is the unit itself.

    Args:
        task: the unit.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __reduce__(self) -> Any:
        """What it is pickled as."""
        return arrived, (self._task,)


def arrived(task: Task) -> Task:
    """The unit, in the process that is to work on it."""
    die_once(task)
    return task


def local(tasks: Sequence[Task], workers: int, directory: Path) -> None:
    """Processes of this machine, as run.engine=local has them."""
    list(engines._in_processes([Mortal(task) for task in tasks], workers))


def ray_data(tasks: Sequence[Task], workers: int, directory: Path) -> None:
    """As run.engine=ray has it."""
    list(engines._on_ray([Mortal(task) for task in tasks], tasks[0].settings))


def datatrove_local(tasks: Sequence[Task], workers: int, directory: Path) -> None:
    """datatrove's executor for one machine."""
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor(
        [Units(directory / "tasks.pkl")], tasks=len(tasks), workers=workers, logging_dir=str(directory / "logs")
    ).run()


def datatrove_tasks(tasks: Sequence[Task], workers: int, directory: Path) -> None:
    """datatrove with a process for each task, as an array job of Slurm starts them."""
    from datatrove.executor import LocalPipelineExecutor

    def start(rank: int) -> int:
        executor = LocalPipelineExecutor(
            [Units(directory / "tasks.pkl")], tasks=len(tasks), workers=1, local_tasks=1, local_rank_offset=rank,
            logging_dir=str(directory / "logs"),
        )  # fmt: skip
        import dill

        file = directory / f"executor-{rank}.pik"
        file.write_bytes(dill.dumps(executor))
        command = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline", str(file)]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

    with ThreadPoolExecutor(workers) as threads:
        codes = list(threads.map(start, range(len(tasks))))
    if any(codes):
        raise RuntimeError(f"{sum(map(bool, codes))} of {len(codes)} tasks failed, and are left for a second start")


CONTESTANTS: dict[str, Callable[[Sequence[Task], int, Path], None]] = {
    "processes (run.engine=local)": local,
    "Ray Data (run.engine=ray)": ray_data,
    "datatrove, local executor": datatrove_local,
    "datatrove, a process for each task as under Slurm": datatrove_tasks,
}


def run(name: str, directory: Path, workers: int, *, limit: float = 600.0, kill: bool = False) -> tuple[float, str]:
    """One engine in a process of its own; its seconds, and how it ended."""
    for manifest in directory.glob("run/stages/*-decontaminate/units/*.json"):
        manifest.unlink()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        (Path(scratch) / "tasks.pkl").write_bytes((directory / "tasks.pkl").read_bytes())
        victim = Path(scratch) / "victim"
        environment = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
        if kill:
            victim.touch()
            environment["KLEAR_BENCHMARK_VICTIM"] = str(victim)
        command = [sys.executable, str(Path(__file__)), "--contestant", name, "--directory", scratch]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--workers", str(workers)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _, said = process.communicate(timeout=limit)
            ended = "finished" if process.returncode == 0 else f"failed: {said.strip().splitlines()[-1][:200]}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            ended = f"hangs (stopped after {limit:.0f} s)"
        seconds = time.perf_counter() - began
    done = len(list(directory.glob("run/stages/*-decontaminate/units/*.json")))
    return round(seconds, 1), f"{ended}; {done} of {len(pickle.loads((directory / 'tasks.pkl').read_bytes()))} units"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rows-per-file", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--contestant", choices=CONTESTANTS)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if options.contestant:
        tasks = pickle.loads((options.directory / "tasks.pkl").read_bytes())
        # Under its importable name, since other processes look functions up by name.
        import curation_engines

        curation_engines.CONTESTANTS[options.contestant](tasks, options.workers, options.directory)
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tasks = prepare(directory, options.documents, options.rows_per_file, options.workers)
        (directory / "tasks.pkl").write_bytes(pickle.dumps(tasks))
        rounds = [
            {contestant: run(contestant, directory, options.workers) for contestant in CONTESTANTS}
            for _ in range(options.rounds)
        ]
        killed = {
            c: run(c, directory, options.workers, limit=PATIENCE + 3 * max(r[c][0] for r in rounds), kill=True)
            for c in CONTESTANTS
        }
    found = {
        "documents": options.documents,
        "units": len(tasks),
        "workers": options.workers,
        "seconds": {c: sorted(r[c][0] for r in rounds)[len(rounds) // 2] for c in CONTESTANTS},
        "rounds": rounds,
        "a worker killed in a unit": killed,
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "datatrove")},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[1],
        "python": platform.python_version(),
    }
    for contestant in CONTESTANTS:
        print(f"{contestant:<52}{found['seconds'][contestant]:>8.1f} s   a worker killed: {killed[contestant][1]}")
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
