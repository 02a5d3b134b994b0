"""One worker of the code graders: a sandbox, and the verdict on one program after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_klear.errors import RewardError
from megatron_klear.reward.code_answers import CodeQuestion
from megatron_klear.reward.code_tests import ANSWER_FILE, CodeProblem, met_tests, parse_problem
from megatron_klear.reward.pool import Died, StartError
from megatron_klear.reward.rules import Verdict
from megatron_klear.reward.sandbox import Limits, NoTime, SandboxError, SandboxMode, SandboxProcess
from megatron_klear.reward.sandbox.process import printable

_MOST_FAULTS = 10_000
"""Problems whose own faults a worker remembers."""


class CodeWorker:
    """Runs the tests of programs; see `pool.PoolWorker`.

    Args:
        mode, python, extra_paths, warm_modules: see `SandboxProcess`.
        limits: of one test.
        all_or_nothing: stop at the first test that fails, since it decides.

    Raises:
        StartError: no sandbox can be made.
    """

    def __init__(
        self,
        mode: SandboxMode,
        limits: Limits,
        *,
        python: str,
        extra_paths: tuple[str, ...] = (),
        warm_modules: tuple[str, ...] = (),
        all_or_nothing: bool = False,
    ) -> None:
        self._limits, self._all_or_nothing = limits, all_or_nothing
        self._faults: dict[str, str] = {}
        try:
            self._sandbox = SandboxProcess(mode, python=python, extra_paths=extra_paths, warm_modules=warm_modules)
        except (RewardError, OSError) as error:
            raise StartError(str(error)) from error

    @property
    def pid(self) -> int:
        return self._sandbox.pid

    def is_alive(self) -> bool:
        return self._sandbox.is_alive()

    def wait_ready(self) -> None:
        """Block until the sandbox is warm.

        Raises:
            StartError: it cannot be made here; says what to change.
        """
        try:
            self._sandbox.wait_ready()
        except RewardError as error:
            raise StartError(str(error)) from error

    def ask(self, question: CodeQuestion) -> Verdict:
        """Run the tests of one program.

        Raises:
            Died: the sandbox failed; it is of no more use.
        """
        problem = parse_problem(question.reference)
        limits = limits_of(problem, self._limits)
        messages = problem.messages()
        tests = met_tests(problem, messages, limits)
        try:
            fault = self._sandbox.open(problem.sources(question.program), limits)
            failures = {0: fault} if fault else self._failures(problem, messages)
            self._sandbox.close_answer()
            broken = self._fault_of_tests(tests, messages, limits) if failures else ""
        except NoTime as error:
            self._sandbox.close_answer()
            return Verdict("ungraded", str(error), tests=tests)
        except (SandboxError, OSError) as error:
            self._sandbox.kill()
            raise Died(str(error)) from error
        if broken:
            return Verdict("ungraded", broken, tests=tests)
        total = len(messages)
        return _verdict(total, 0 if fault else total - len(failures), failures)._replace(tests=tests)

    def kill(self) -> None:
        """End it at once."""
        self._sandbox.kill()

    def discard(self) -> None:
        """End it and give back what it holds."""
        self._sandbox.discard()

    def _fault_of_tests(self, tests: str, messages: Sequence[dict[str, Any]], limits: Limits) -> str:
        """What is wrong with the tests themselves, whatever the answer; found where no answer is, so that none brings
        it about.

        Args:
            tests: their fingerprint.
        """
        if messages[0]["kind"] != "assert":
            return ""
        if tests not in self._faults:
            if len(self._faults) >= _MOST_FAULTS:
                self._faults.clear()
            self._sandbox.open({ANSWER_FILE: ""}, limits)
            told = ((i, self._sandbox.run(message, answered=False)) for i, message in enumerate(messages, start=1))
            found = next(((i, result.output) for i, result in told if result.output), None)
            self._sandbox.close_answer()
            self._faults[tests] = ""
            if found:
                text = printable(found[1].decode("utf-8", "replace"))
                self._faults[tests] = f"test {found[0]} fails without any answer: {text}"
        return self._faults[tests]

    def _failures(self, problem: CodeProblem, messages: Sequence[dict[str, Any]]) -> dict[int, str]:
        """What is wrong, by number of the test; only where one failure decides the score are the others not run."""
        failures: dict[int, str] = {}
        for index, message in enumerate(messages):
            result = self._sandbox.run(message)
            fault = result.problem or problem.judge(index, result.output)
            if fault:
                failures[index] = fault
            if failures and self._all_or_nothing:
                return failures | dict.fromkeys(range(index + 1, len(messages)), "not run")
        return failures


def limits_of(problem: CodeProblem, limits: Limits) -> Limits:
    """The limits of each test of a problem, which may bring a CPU time of its own; the clock's grows with it."""
    if problem.cpu_seconds is None:
        return limits
    longer = problem.cpu_seconds * limits.wall_seconds / limits.cpu_seconds
    return replace(limits, cpu_seconds=problem.cpu_seconds, wall_seconds=longer)


def _verdict(total: int, passed: int, failures: dict[int, str]) -> Verdict:
    if passed == total:
        return Verdict("correct", f"passed all {total} tests", 1.0)
    index, fault = next(iter(failures.items()))
    reason = f"passed {passed} of {total} tests; test {index + 1}: {fault}"
    return Verdict("partial" if passed else "wrong", reason, passed / total)
