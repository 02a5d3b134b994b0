"""Where units of stages that look at one row at a time are worked on: here, in processes, or on a Ray cluster.

Scheduling, retries and machines are Ray's business: what is here hands it one unit per item. Units and their results
travel as files, so `run.dir` and the input must be seen by all machines under the same paths.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.stage import Advance, Stage, UnitJob, do_unit
from megatron_klear.curation.stages import make_stage
from megatron_klear.errors import DataError, KlearError
from megatron_klear.parallel import end_with_parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A unit as it travels to another process.

    Attributes:
        stage: name of its stage.
        fingerprint: of the stage's rules and input; a process prepares a stage once for each.
        settings: of the run.
        job: the unit.
    """

    stage: str
    fingerprint: str
    settings: CurationSettings
    job: UnitJob


_prepared: dict[tuple[str, str], Stage] = {}


def do_task(task: Task) -> dict[str, Any]:
    """Work on a unit in any process; returns its manifest."""
    key = (task.stage, task.fingerprint)
    if key not in _prepared:
        _prepared.clear()  # a process works on one stage at a time
        stage = make_stage(task.stage, task.settings)
        stage.start((), task.job.directory, lambda count: None)
        _prepared[key] = stage
    return do_unit(_prepared[key], task.job)


def work(
    stage: Stage, jobs: Sequence[UnitJob], settings: CurationSettings, fingerprint: str, advance: Advance
) -> Iterator[dict[str, Any]]:
    """Yield the manifest of every unit as it is done, in any order.

    Args:
        stage: prepared already.
        jobs: the units to make.
        settings: of the run.
        fingerprint: of the stage's rules and input.
        advance: told of rows.
    """
    workers, engine = settings.run.workers, settings.run.engine
    if not stage.stateless or (engine == "local" and workers == 1):
        for job in jobs:
            yield do_unit(stage, job, advance)
        return
    tasks = [Task(stage=stage.name, fingerprint=fingerprint, settings=settings, job=job) for job in jobs]
    done = _on_ray(tasks, settings) if engine == "ray" else _in_processes(tasks, workers)
    for manifest in done:
        advance(manifest["audit"]["rows_in"])
        yield manifest


def _in_processes(tasks: Sequence[Task], workers: int) -> Iterator[dict[str, Any]]:
    # Spawned, not forked: a fork would copy threads' locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start_process, initargs=(os.getpid(),)
    ) as pool:
        try:
            # Ctrl-C is this process's, which lets units that are begun be finished: workers start with it blocked.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(do_task, task) for task in tasks]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise KlearError(
                "a worker process was killed, mostly by the kernel for want of memory; lower run.workers "
                "and start again on the same run.dir: what is finished is kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_process(parent: int) -> None:
    """A worker that outlived a killed run would write into the files of the one that resumes it."""
    end_with_parent(at_once=True)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _on_ray(tasks: Sequence[Task], settings: CurationSettings) -> Iterator[dict[str, Any]]:
    ray = _import_ray()
    run = settings.run
    if not ray.is_initialized():
        # One CPU more than there are workers: Ray Data keeps one for itself and otherwise waits for it in vain.
        local = {} if run.ray_address else {"num_cpus": run.workers + 1, "include_dashboard": False}
        ray.init(address=run.ray_address or None, log_to_driver=False, logging_level=logging.ERROR, **local)
        ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own progress would stand beside ours
    units = ray.data.from_items([{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
    done = units.map(_do_item, compute=ray.data.TaskPoolStrategy(size=run.workers))
    for row in done.iter_rows():
        yield json.loads(row["manifest"])


def _do_item(item: dict[str, bytes]) -> dict[str, str]:
    """Work on a unit of a Ray data set: plain bytes in and out, which travel in Arrow as they are."""
    return {"manifest": json.dumps(do_task(pickle.loads(item["task"])))}


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DataError(
            f"run.engine is ray, and it cannot be imported ({error}); install the extra ray, or set run.engine=local"
        ) from error
    return ray
