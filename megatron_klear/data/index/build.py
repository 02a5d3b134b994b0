"""Makes the index of SFT rows, in parallel processes, part by part; what was finished before a kill is kept."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_klear.data.index import files
from megatron_klear.data.index.files import IndexSource
from megatron_klear.data.index.merge import merge_parts
from megatron_klear.data.index.parts import LINE_BYTES, PART_BYTES, Part, plan_parts
from megatron_klear.data.index.tokenize import PartCounts, PartJob, do_part, unreadable
from megatron_klear.data.jsonl import JsonObject
from megatron_klear.errors import DataError

log = logging.getLogger(__name__)

_PROCESS_BYTES = 8 << 20
"""Input that is worth a process of its own, which takes seconds to start."""

_TOLD_SECONDS = 10.0
_POLL_SECONDS = 0.5
_PLAN = "plan.json"


def prepare_index(
    source: IndexSource,
    *,
    processes: int | None = None,
    alive: Callable[[], None] = lambda: None,
    part_bytes: int = PART_BYTES,
    line_bytes: int = LINE_BYTES,
) -> None:
    """Tokenize the rows of `source`, unless its index is there already.

    Of several processes that ask for the same index one makes it, and the others wait for it. On a file system without
    locks several may make it, which is warned of: the index of the first that ends is whole, and stays so.

    Args:
        source: the input and where its index belongs.
        processes: tokenizer processes; None is as many as this process may use CPUs, fewer for little input.
        alive: called every second or so, with one process after every part; what it raises ends the work.
        part_bytes: input per part.
        line_bytes: longest line that is read.

    Raises:
        DataError: input is no such file, or the index cannot be written (data.index_dir).
    """
    manifest = source.directory / files.MANIFEST
    if manifest.is_file():
        return
    try:
        source.directory.mkdir(parents=True, exist_ok=True)
        with _locked(source.directory / ".lock", alive) as is_alone:
            if not manifest.is_file():
                parts = _planned(source, part_bytes)
                if not parts:
                    raise DataError(f"data.sft: no rows at all in {', '.join(source.files)}")
                jobs = [PartJob(number=i, part=p, source=source, line_bytes=line_bytes) for i, p in enumerate(parts)]
                counts = _do_all(jobs, processes or _worthwhile_processes(parts), alive)
                merge_parts(jobs, counts, alive, is_alone=is_alone)
    except OSError as error:
        if manifest.is_file():  # another maker was first, and has removed the parts
            return
        if error.filename in source.files:
            raise unreadable(str(error.filename), error) from error
        raise DataError(
            f"data.index_dir: the tokens of data.sft cannot be written to {source.directory}: "
            f"{error.strerror or error}. Make room, or set data.index_dir; what is finished is kept."
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            "data.tokenize_processes: a tokenizer process was killed, perhaps for want of memory; set fewer and start "
            "again: what is finished is kept"
        ) from error


@contextmanager
def _locked(file: Path, alive: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock that ends with this process; yields False where the file system has none, which is warned of."""
    with file.open("a") as stream:
        told, held = False, True
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    log.info("%s is being made by another process; waiting for it", file.parent)
                told = True
                alive()
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                held = False
                log.warning(
                    "%s: no lock can be had there (%s), so that other runs may make the same index at the same time",
                    file.parent, error.strerror or error,
                )  # fmt: skip
                break
        yield held


def _planned(source: IndexSource, part_bytes: int) -> list[Part]:
    """The parts that were planned when the index was begun, else a new plan: finished parts stay what they are."""
    plan = source.directory / files.PARTS / _PLAN
    try:
        return [Part(**part) for part in json.loads(plan.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        pass
    parts = plan_parts(source.files, part_bytes)
    plan.parent.mkdir(exist_ok=True)
    text: list[JsonObject] = [asdict(part) for part in parts]
    fresh = plan.with_suffix(".new")
    fresh.write_text(json.dumps(text), encoding="utf-8")
    fresh.replace(plan)
    return parts


def _worthwhile_processes(parts: Sequence[Part]) -> int:
    """As many as this process may use CPUs, unless there is less to do than they take to start."""
    return max(1, min(len(os.sched_getaffinity(0)), sum(p.input_bytes for p in parts) // _PROCESS_BYTES))


def _do_all(jobs: Sequence[PartJob], processes: int, alive: Callable[[], None]) -> list[PartCounts]:
    progress = _Progress(jobs)
    if min(processes, len(jobs)) == 1:
        counts = []
        for job in jobs:
            counts.append(do_part(job))
            progress.done(job, counts[-1])
            alive()
        return counts
    # Not forked: the caller may have threads and a GPU.
    spawn = multiprocessing.get_context("spawn")
    found: dict[int, PartCounts] = {}
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn, initializer=_start_process) as pool:
        pending: dict[Future[PartCounts], PartJob] = {pool.submit(do_part, job): job for job in jobs}
        try:
            while pending:
                for future in wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    job = pending.pop(future)
                    found[job.number] = future.result()
                    progress.done(job, found[job.number])
                alive()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[job.number] for job in jobs]


def _start_process() -> None:
    from megatron_klear.parallel.orphans import end_with_parent  # takes in torch, which plans do without

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which lets parts that are begun be finished
    warnings.filterwarnings("ignore", module=r"megatron\..*")  # of packages that are not there
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every CPU has a process
    logging.getLogger("transformers").setLevel(logging.ERROR)


class _Progress:
    """Tells now and then how much of the input is tokenized, and the time left."""

    def __init__(self, jobs: Sequence[PartJob]) -> None:
        self._total = sum(job.part.input_bytes for job in jobs)
        self._bytes = self._rows = self._rejected = self._finished = 0
        self._count = len(jobs)
        self._start = self._told = time.monotonic()
        log.info("tokenizing %s in %d parts to %s", _size(self._total), len(jobs), jobs[0].source.directory)

    def done(self, job: PartJob, counts: PartCounts) -> None:
        """Count a finished part."""
        self._finished += 1
        self._bytes += job.part.input_bytes
        self._rows += counts.rows
        self._rejected += counts.rejected
        now = time.monotonic()
        if now - self._told < _TOLD_SECONDS and self._finished < self._count:
            return
        self._told = now
        left = (now - self._start) * (self._total - self._bytes) / max(self._bytes, 1)
        log.info(
            "tokenized %d of %d parts (%s of %s), %d conversations, %d rows rejected; %.0f s left",
            self._finished, self._count, _size(self._bytes), _size(self._total), self._rows, self._rejected, left,
        )  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
