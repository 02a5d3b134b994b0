"""Code grading in sandboxes that are reused: many responses at a time, or one."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from megatron_klear.errors import ConfigError, RewardError
from megatron_klear.records import FinishReason, Grade
from megatron_klear.reward.code_answers import CodeQuestion, read_program
from megatron_klear.reward.code_worker import CodeWorker
from megatron_klear.reward.pool import WorkerPool
from megatron_klear.reward.rules import AnswerFormat, CodeRewardRules, Verdict
from megatron_klear.reward.sandbox import Limits, SandboxMode
from megatron_klear.reward.workers import GradeRequest

DEFAULT_PYTHON = "/usr/bin/python3"
"""The distribution's interpreter starts several times faster than one with many paths to search."""


class CodeGraderPool(WorkerPool[CodeQuestion]):
    """Grades programs against all tests of their problems; use it as a context manager, from any thread.

    Equation: Section 3.2.4, the reward is the share of tests passed (4 of 16 is 0.25).

    A worker is a sandbox that is started once and gives every answer namespaces and a scratch folder of its own. Grades
    depend on the program and its tests only: time is limited by CPU time and what a program sleeps, sets of texts have
    the same order in every run. A program that draws random numbers may still be graded one way or the other.

    Args:
        workers: sandboxes, and programs graded at the same time.
        sandbox: `bubblewrap`, or `rlimits` for code that may read this machine's files.
        limits: of one test.
        rules, answer_format: rewards, and the form a response must have.
        python: interpreter that runs the programs.
        extra_paths: folders that programs may read and import from.
        warm_modules: modules imported once per sandbox, so that programs find them loaded.

    Raises:
        ConfigError: a number is out of bounds.
    """

    def __init__(
        self,
        *,
        workers: int = 4,
        sandbox: SandboxMode = "bubblewrap",
        limits: Limits | None = None,
        rules: CodeRewardRules | None = None,
        answer_format: AnswerFormat | None = None,
        python: str = DEFAULT_PYTHON,
        extra_paths: tuple[str, ...] = (),
        warm_modules: tuple[str, ...] = (),
    ) -> None:
        if workers < 1:
            raise ConfigError([f"code_reward.workers: must be at least 1, got {workers}"])
        self.rules = rules or CodeRewardRules()
        self.answer_format = answer_format or AnswerFormat()
        limits = limits or Limits()
        if sandbox == "rlimits" and limits.allow_processes:
            raise ConfigError(["code_reward.allow_processes: got true, needs code_reward.sandbox=bubblewrap"])

        def make() -> CodeWorker:
            return CodeWorker(
                sandbox,
                limits,
                python=python,
                extra_paths=extra_paths,
                warm_modules=warm_modules,
                all_or_nothing=self.rules.score == "hard",
            )

        super().__init__(make, workers, "code grading")

    def grade_many(
        self,
        requests: Sequence[GradeRequest | tuple[str, str, str]],
        *,
        answer_format: AnswerFormat | None = None,
    ) -> list[Grade]:
        """Grades in the order of the requests.

        Args:
            requests: `GradeRequest`s, or plain (id, response, reference) of finished responses.
            answer_format: for this call only; default the pool's.

        Raises:
            RewardError: two requests share an id, the pool is closed, or no sandbox could be started, so that every
                program would be ungraded.
        """
        return [self.rules.grade(verdict) for verdict in self.judge_many(requests, answer_format=answer_format)]

    def judge_many(
        self,
        requests: Sequence[GradeRequest | tuple[str, str, str]],
        *,
        answer_format: AnswerFormat | None = None,
    ) -> list[Verdict]:
        """Verdicts with pass rates, before rewards; see `grade_many`."""
        entries: dict[str, Verdict | CodeQuestion] = {}
        for request in requests:
            request_id, response, reference, finish_reason = GradeRequest(*request)
            if request_id in entries:
                raise RewardError(f"two answers to grade share the id {request_id!r}")
            entries[request_id] = read_program(response, reference, finish_reason, answer_format or self.answer_format)
        verdicts = self.decide([entry for entry in entries.values() if isinstance(entry, CodeQuestion)])
        return [verdicts[e] if isinstance(e, CodeQuestion) else e for e in entries.values()]


_lock = threading.Lock()
_shared: tuple[int, CodeGraderPool] | None = None
"""The process that made the pool, and the pool: after a fork its threads exist in the parent only."""


def grade_code(
    response: str,
    reference: str,
    *,
    finish_reason: FinishReason = "stop",
    rules: CodeRewardRules | None = None,
    answer_format: AnswerFormat | None = None,
) -> Grade:
    """Grade one response: the program in its last fenced block against the tests of the problem, in a sandbox.

    Runs in one sandbox that is started at the first call and shared by all later ones, with the default limits; safe
    from any thread and on any text. Use `CodeGraderPool` for many responses.

    Args:
        response: decoded response text; of the prompt only an opening marker that it ends with.
        reference: tests as JSON, see `code_tests`.
        finish_reason: why the generation ended; `abort` is ungraded, `length` is graded as far as it got.
        rules: rewards; default `CodeRewardRules()`.
        answer_format: markers and strictness; default `AnswerFormat()`.

    Returns:
        A grade; `ungraded` with the reason whenever the grader fails. Nothing about the texts raises.
    """
    rules = rules or CodeRewardRules()
    request = GradeRequest("response", response, reference, finish_reason)
    try:
        return rules.grade(_shared_pool().judge_many([request], answer_format=answer_format)[0])
    except RewardError as error:
        return rules.grade(Verdict("ungraded", str(error)))


def _shared_pool() -> CodeGraderPool:
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), CodeGraderPool(workers=1))
        return _shared[1]


def _forget_lock() -> None:
    """A forked child may inherit the lock as held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
