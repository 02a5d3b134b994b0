"""Killable workers with one thread each in the parent: a limit per answer, replaced workers, no orphans.

Each worker has its own socket and its own thread in the parent, so that killing one worker cannot touch another.
(Pools that share one queue between processes, such as pebble 5.2.3, hang or break when a worker is killed while
it holds the queue's lock; threads cannot be killed at all.)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from megatron_klear.errors import RewardError
from megatron_klear.reward.rules import Verdict

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Workers that may die on one question before it is given up."""
START_ATTEMPTS = 2

_CLOSED = Verdict("ungraded", "the grader pool was closed")

QuestionT = TypeVar("QuestionT", bound=Hashable)
QuestionT_contra = TypeVar("QuestionT_contra", bound=Hashable, contravariant=True)


class StartError(Exception):
    """A worker process cannot be started."""


class TimedOut(Exception):
    """A worker did not answer within the wall-clock limit, which the text names: the machine may be to blame."""


class Overrun(Exception):
    """A question took a worker beyond a limit of its own, which the text names: any machine would have seen it."""


class Died(Exception):
    """A worker ended, or answered nonsense, while it had a question.

    Attributes:
        crashed: by a fault of its own, as an overflow of its stack; nobody killed it.
    """

    def __init__(self, text: str, *, crashed: bool = False) -> None:
        super().__init__(text)
        self.crashed = crashed


class PoolWorker(Protocol[QuestionT_contra]):
    """One child process; used by a single thread, but `kill` may come from any."""

    @property
    def pid(self) -> int: ...

    def is_alive(self) -> bool: ...

    def wait_ready(self) -> None:
        """Block until it can be asked; raises StartError."""

    def ask(self, question: QuestionT_contra) -> Verdict:
        """Its verdict; raises TimedOut, Overrun or Died, and then it is of no more use."""

    def kill(self) -> None:
        """End it at once."""

    def discard(self) -> None:
        """End it and give back what it holds; only from the thread that uses it."""


class _Job(NamedTuple, Generic[QuestionT]):
    question: QuestionT
    verdict: Future[Verdict]


class WorkerPool(Generic[QuestionT]):
    """Decides questions in parallel worker processes; use it as a context manager, from any thread.

    Verdicts depend only on the question, never on order, neighbours or the number of workers. Equal questions within a
    call are decided once. Workers start in the background with the pool.

    Args:
        make_worker: starts a worker; raises StartError.
        num_workers: processes, and questions decided at the same time.
        what: names the graders in messages.
        without_answer: the question that the reference alone leaves. It is asked when a question overran or crashed its
            worker: if that one ends well, the answer is to blame and is wrong, else the question is ungraded. Without
            it such questions are ungraded.
    """

    def __init__(
        self,
        make_worker: Callable[[], PoolWorker[QuestionT]],
        num_workers: int,
        what: str,
        *,
        without_answer: Callable[[QuestionT], QuestionT] | None = None,
    ) -> None:
        self._make_worker, self._num_workers, self._what = make_worker, num_workers, what
        self._without_answer = without_answer
        self._jobs: SimpleQueue[_Job[QuestionT] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the four below, and "a slot serves" against "a job is queued"
        self._slots: list[threading.Thread] = []
        self._num_serving = 0
        self._workers: set[PoolWorker[QuestionT]] = set()
        self._closed = False
        with self._lock:
            self._fill_slots()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive at this moment."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers if worker.is_alive())

    def close(self) -> None:
        """Kill all workers, also busy ones; a `grade_many` in another thread gets `ungraded` for the rest."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for _ in self._slots:
                self._jobs.put(None)
            for worker in self._workers:
                worker.kill()
        for slot in self._slots:
            slot.join()
        self._drain(_CLOSED)

    def decide(self, questions: Sequence[QuestionT]) -> dict[QuestionT, Verdict]:
        """The verdict of each distinct question.

        Raises:
            RewardError: the pool is closed, or no worker could be started, so that every question would be ungraded.
        """
        jobs = [_Job(question, Future()) for question in dict.fromkeys(questions)]
        with self._lock:
            if self._closed:
                raise RewardError("the grader pool is closed")
            self._fill_slots()
            for job in jobs:
                self._jobs.put(job)
        verdicts: dict[QuestionT, Verdict] = {}
        start_problem: StartError | None = None
        num_not_started = 0
        try:
            for job in jobs:
                try:
                    verdicts[job.question] = job.verdict.result()
                except StartError as error:
                    start_problem, num_not_started = error, num_not_started + 1
                    verdicts[job.question] = Verdict("ungraded", f"no grading worker could be started: {error}")
        finally:
            for job in jobs:
                job.verdict.cancel()  # nothing is left to cancel unless waiting was interrupted
        if start_problem is not None and num_not_started == len(jobs):
            raise RewardError(f"no {self._what} worker could be started: {start_problem}")
        return verdicts

    def _fill_slots(self) -> None:
        """Start the threads that are missing; the lock is held."""
        while self._num_serving < self._num_workers:
            # A daemon, so that a forgotten close() does not keep the interpreter from ending; the kernel then
            # kills the workers. The thread lives as long as its workers, because they die with their *thread*.
            slot = threading.Thread(target=self._serve, name=self._what, daemon=True)
            self._slots = [thread for thread in self._slots if thread.is_alive()] + [slot]
            slot.start()
            self._num_serving += 1

    def _serve(self) -> None:
        """One slot: keep a worker, take questions from the queue, one at a time."""
        worker: PoolWorker[QuestionT] | None = None
        job: _Job[QuestionT] | None = None
        try:
            while True:
                worker = self._living(worker)
                job = self._jobs.get()
                if job is None:
                    break
                if _claim(job):
                    worker = self._answer(worker, job)
                job = None
        except StartError as error:
            self._retire(job, error)
        except Exception as error:  # a fault of ours must not leave callers waiting
            logger.exception("a %s worker's thread failed", self._what)
            self._retire(job, StartError(f"{type(error).__name__}: {error}"))
        finally:
            if worker is not None:
                self._discard(worker)

    def _answer(self, worker: PoolWorker[QuestionT] | None, job: _Job[QuestionT]) -> PoolWorker[QuestionT] | None:
        """Settle one job; returns the worker if it is still good.

        Raises:
            StartError: the worker died and no other can be started; the job is not settled.
        """
        worker, found = self._ask(worker, job.question)
        if isinstance(found, Overrun):
            worker, found = self._blame(worker, job.question, found)
        job.verdict.set_result(found)
        return worker

    def _blame(
        self, worker: PoolWorker[QuestionT] | None, question: QuestionT, overrun: Overrun
    ) -> tuple[PoolWorker[QuestionT] | None, Verdict]:
        """Whether answer or reference was too much; an answer must not escape its grade by being that."""
        if self._without_answer is None:
            return worker, Verdict("ungraded", f"the question {overrun}")
        worker, alone = self._ask(worker, self._without_answer(question))
        if alone is _CLOSED:
            return worker, _CLOSED
        if isinstance(alone, Verdict) and alone.outcome != "ungraded":
            return worker, Verdict("wrong", f"the answer {overrun}")
        why = f": {alone.reason}" if isinstance(alone, Verdict) else ""
        return worker, Verdict("ungraded", f"the reference {overrun}{why}")

    def _ask(
        self, worker: PoolWorker[QuestionT] | None, question: QuestionT
    ) -> tuple[PoolWorker[QuestionT] | None, Verdict | Overrun]:
        """The worker if it is still good, and its verdict or what the question did to it.

        Raises:
            StartError: the worker died and no other can be started.
        """
        death = Died("")
        for _ in range(ATTEMPTS):
            worker = self._living(worker)
            try:
                return worker, worker.ask(question)
            except TimedOut as error:
                self._discard(worker)
                return None, Verdict("ungraded", str(error))
            except Overrun as error:
                self._discard(worker)
                return None, _CLOSED if self._closed else error
            except Died as error:
                self._discard(worker)
                worker, death = None, error
                if self._closed:
                    break
        if self._closed:
            return None, _CLOSED
        told = f"died {ATTEMPTS} times ({death})"
        return None, Overrun(f"ended its worker, which {told}") if death.crashed else Verdict(
            "ungraded", f"the worker {told}"
        )

    def _living(self, worker: PoolWorker[QuestionT] | None) -> PoolWorker[QuestionT]:
        """The given worker if it lives, or a fresh one that is ready.

        Raises:
            StartError: after `START_ATTEMPTS` failures in a row, or because the pool is closed.
        """
        if worker is not None:
            if worker.is_alive():
                return worker
            self._discard(worker)
        problem = StartError(_CLOSED.reason)
        for _ in range(START_ATTEMPTS):
            with self._lock:
                if self._closed:
                    break
                try:
                    worker = self._make_worker()
                except StartError as error:
                    problem = error
                    continue
                self._workers.add(worker)
            try:
                worker.wait_ready()
                return worker
            except StartError as error:
                self._discard(worker)
                problem = error
        raise problem

    def _discard(self, worker: PoolWorker[QuestionT]) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.discard()

    def _retire(self, job: _Job[QuestionT] | None, error: StartError) -> None:
        """End a slot that cannot start workers: the others take its job, the last one gives up on all of them."""
        with self._lock:
            self._num_serving -= 1
            if self._closed:
                _settle(job, _CLOSED)
                return
            logger.warning("a %s worker cannot be started: %s", self._what, error)
            if self._num_serving > 0:
                if job is not None:
                    self._jobs.put(job)
                return
            _settle(job, error)
            self._drain(error)

    def _drain(self, outcome: Verdict | StartError) -> None:
        """Settle every queued job the same way."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None and _claim(job):
                _settle(job, outcome)


def _claim(job: _Job[QuestionT]) -> bool:
    """Whether the job is still wanted; a job handed on by a retired slot is claimed already."""
    return job.verdict.running() or job.verdict.set_running_or_notify_cancel()


def _settle(job: _Job[QuestionT] | None, outcome: Verdict | StartError) -> None:
    if job is None:
        return
    if isinstance(outcome, Verdict):
        job.verdict.set_result(outcome)
    else:
        job.verdict.set_exception(outcome)
