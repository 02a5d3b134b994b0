"""Math grading in killable worker processes: a time limit per answer, replaced workers, no orphans.

Each worker has its own socket and its own thread in the parent, so that killing one worker cannot touch another.
(Pools that share one queue between processes, such as pebble 5.2.3, hang or break when a worker is killed while
it holds the queue's lock; threads cannot be killed at all.)
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self

from megatron_klear.errors import ConfigError, RewardError
from megatron_klear.records import FinishReason, Grade
from megatron_klear.reward.answers import Question, Verdict, read_answer
from megatron_klear.reward.rules import AnswerFormat, RewardRules
from megatron_klear.reward.worker_handle import Died, StartError, TimedOut, Worker

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Workers that may die on one answer before it is ungraded."""
START_ATTEMPTS = 2
MINIMUM_MEMORY_BYTES = 256 * 2**20

_CLOSED = Verdict("ungraded", "the grader pool was closed")


class GradeRequest(NamedTuple):
    """One response to grade; `request_id` must be unique within a call."""

    request_id: str
    response: str
    reference: str
    finish_reason: FinishReason = "stop"


class _Job(NamedTuple):
    question: Question
    verdict: Future[Verdict]


class MathGraderPool:
    """Grades math answers in parallel worker processes; use it as a context manager, from any thread.

    Grades depend only on the text of an answer and its reference, never on order, neighbours or the number of
    workers. Equal questions within a call are decided once. Workers start in the background with the pool.

    Args:
        workers: processes, and answers graded at the same time.
        timeout_seconds: wall-clock limit of one answer; its worker is killed and the answer is `ungraded`.
        memory_limit_bytes: address space of a worker (RLIMIT_AS), None for no limit. An allocation that fails
            inside sympy's simplification may be swallowed there and end as "not equal".
        rules, answer_format: rewards, and the form a response must have.

    Raises:
        ConfigError: a number is out of bounds.
    """

    def __init__(
        self,
        *,
        workers: int = 4,
        timeout_seconds: float = 5.0,
        memory_limit_bytes: int | None = 4 * 2**30,
        rules: RewardRules | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> None:
        problems = []
        if workers < 1:
            problems.append(f"reward.workers: must be at least 1, got {workers}")
        if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
            problems.append(f"reward.timeout_seconds: must be a positive number of seconds, got {timeout_seconds}")
        if memory_limit_bytes is not None and memory_limit_bytes < MINIMUM_MEMORY_BYTES:
            at_least = f"{MINIMUM_MEMORY_BYTES} (256 MiB)"
            problems.append(f"reward.memory_limit_bytes: must be at least {at_least}, got {memory_limit_bytes}")
        if problems:
            raise ConfigError(problems)
        self.rules = rules or RewardRules()
        self.answer_format = answer_format or AnswerFormat()
        self._timeout_seconds = timeout_seconds
        self._memory_limit_bytes = memory_limit_bytes or 0
        self._num_workers = workers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the four below, and "a slot serves" against "a job is queued"
        self._slots: list[threading.Thread] = []
        self._num_serving = 0
        self._workers: set[Worker] = set()
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

    def grade_many(
        self,
        requests: Sequence[GradeRequest | tuple[str, str, str]],
        *,
        rules: RewardRules | None = None,
        answer_format: AnswerFormat | None = None,
    ) -> list[Grade]:
        """Grades in the order of the requests.

        Args:
            requests: `GradeRequest`s, or plain (id, response, reference) of finished responses.
            rules, answer_format: for this call only; default the pool's.

        Raises:
            RewardError: two requests share an id, the pool is closed, or no worker could be started, so that
                every answer that needed one would be ungraded.
        """
        rules, answer_format = rules or self.rules, answer_format or self.answer_format
        entries: dict[str, Verdict | Question] = {}
        for request in requests:
            request_id, response, reference, finish_reason = GradeRequest(*request)
            if request_id in entries:
                raise RewardError(f"two answers to grade share the id {request_id!r}")
            entries[request_id] = read_answer(response, reference, finish_reason, answer_format)
        verdicts = self._decide([entry for entry in entries.values() if isinstance(entry, Question)])
        return [rules.grade(*(verdicts[entry] if isinstance(entry, Question) else entry)) for entry in entries.values()]

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

    def _decide(self, questions: Sequence[Question]) -> dict[Question, Verdict]:
        """The verdict of each distinct question."""
        jobs = [_Job(question, Future()) for question in dict.fromkeys(questions)]
        with self._lock:
            if self._closed:
                raise RewardError("the grader pool is closed")
            self._fill_slots()
            for job in jobs:
                self._jobs.put(job)
        verdicts: dict[Question, Verdict] = {}
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
            raise RewardError(f"no math grading worker could be started: {start_problem}")
        return verdicts

    def _fill_slots(self) -> None:
        """Start the threads that are missing; the lock is held."""
        while self._num_serving < self._num_workers:
            # A daemon, so that a forgotten close() does not keep the interpreter from ending; the kernel then
            # kills the workers. The thread lives as long as its workers, because they die with their *thread*.
            slot = threading.Thread(target=self._serve, name="math-grader", daemon=True)
            self._slots = [thread for thread in self._slots if thread.is_alive()] + [slot]
            slot.start()
            self._num_serving += 1

    def _serve(self) -> None:
        """One slot: keep a worker, take questions from the queue, one at a time."""
        worker: Worker | None = None
        job: _Job | None = None
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
        finally:
            if worker is not None:
                self._discard(worker)

    def _answer(self, worker: Worker | None, job: _Job) -> Worker | None:
        """Settle one job; returns the worker if it is still good.

        Raises:
            StartError: the worker died and no other can be started; the job is not settled.
        """
        death = ""
        for _ in range(ATTEMPTS):
            worker = self._living(worker)
            try:
                job.verdict.set_result(worker.ask(job.question, self._timeout_seconds))
                return worker
            except TimedOut:
                self._discard(worker)
                job.verdict.set_result(Verdict("ungraded", f"no verdict within {self._timeout_seconds:g} s"))
                return None
            except Died as error:
                self._discard(worker)
                worker, death = None, str(error)
                if self._closed:
                    break
        died = Verdict("ungraded", f"the worker died {ATTEMPTS} times ({death})")
        job.verdict.set_result(_CLOSED if self._closed else died)
        return None

    def _living(self, worker: Worker | None) -> Worker:
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
                    worker = Worker(self._memory_limit_bytes)
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

    def _discard(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.discard()

    def _retire(self, job: _Job | None, error: StartError) -> None:
        """End a slot that cannot start workers: the others take its job, the last one gives up on all of them."""
        with self._lock:
            self._num_serving -= 1
            if self._closed:
                _settle(job, _CLOSED)
                return
            logger.warning("a math grading worker cannot be started: %s", error)
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


def _claim(job: _Job) -> bool:
    """Whether the job is still wanted; a job handed on by a retired slot is claimed already."""
    return job.verdict.running() or job.verdict.set_running_or_notify_cancel()


def _settle(job: _Job | None, outcome: Verdict | StartError) -> None:
    if job is None:
        return
    if isinstance(outcome, Verdict):
        job.verdict.set_result(outcome)
    else:
        job.verdict.set_exception(outcome)
