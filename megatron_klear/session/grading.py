"""The graders of a run: one pool for each domain that its data has, made from the settings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from megatron_klear.config import CodeRewardSettings, RewardSettings, Settings
from megatron_klear.data import ChatTokenizer, PromptData
from megatron_klear.errors import ConfigError, DataError, RewardError
from megatron_klear.records import Domain, Grade, RolloutGroup
from megatron_klear.reward import (
    AnswerFormat,
    BadTestsError,
    CodeGraderPool,
    CodeRewardRules,
    GradeRequest,
    Limits,
    MathGraderPool,
    RewardRules,
    parse_problem,
)

_SHOWN_PROBLEMS = 8


class ThinkTags(Protocol):
    """The tags that enclose the thinking part of a response."""

    @property
    def think_start(self) -> str: ...

    @property
    def think_end(self) -> str: ...


class GradingSettings(Protocol):
    """The settings that graders are made from; those of every entry that grades have them."""

    @property
    def reward(self) -> RewardSettings: ...

    @property
    def code_reward(self) -> CodeRewardSettings: ...

    @property
    def tokenizer(self) -> ThinkTags: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """The usual tags."""

    think_start: str = "<think>"
    think_end: str = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraderSettings:
    """What graders are made from, for an entry whose settings have no section `tokenizer`."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    code_reward: CodeRewardSettings = field(default_factory=CodeRewardSettings)
    tokenizer: Tags = Tags()


_PROBE = ("probe", "```python\nprint(1)\n```", '{"kind": "stdin", "tests": [{"input": "", "output": "1"}]}')


class Graders:
    """Grades responses of any domain; workers of a domain start when it is first met.

    Args:
        settings: sections `reward`, `code_reward` and `tokenizer`.
        ranks_per_machine: processes that share a machine's workers.
    """

    def __init__(self, settings: GradingSettings, ranks_per_machine: int = 1) -> None:
        self._settings, self._ranks = settings, ranks_per_machine
        self._close = ExitStack()
        self._lock = threading.Lock()  # held-out problems may be graded beside those of training
        self._math: MathGraderPool | None = None
        self._code: CodeGraderPool | None = None

    def close(self) -> None:
        """End all workers."""
        self._close.close()

    def grade_many(self, requests: Sequence[tuple[Domain, GradeRequest]]) -> list[Grade]:
        """Grades in the order of the requests.

        Args:
            requests: domain and response; ids are unique among all of them.

        Raises:
            RewardError: no worker of a domain can be started.
        """
        math = [request for domain, request in requests if domain == "math"]
        code = [request for domain, request in requests if domain == "code"]
        grades = iter(self.math.grade_many(math) if math else [])
        code_grades = iter(self.code.grade_many(code) if code else [])
        return [next(grades if domain == "math" else code_grades) for domain, _ in requests]

    @property
    def math(self) -> MathGraderPool:
        """The math graders."""
        with self._lock:
            if self._math is None:
                self._math = self._close.enter_context(math_graders(self._settings, self._ranks))
            return self._math

    @property
    def code(self) -> CodeGraderPool:
        """The code graders."""
        with self._lock:
            if self._code is None:
                self._code = self._close.enter_context(code_graders(self._settings, self._ranks))
            return self._code


def grade_requests(chat: ChatTokenizer, groups: Sequence[RolloutGroup]) -> list[tuple[Domain, GradeRequest]]:
    """What to grade of groups, response by response: their texts with what the chat template opens for them."""
    return [
        (
            group.prompt.domain,
            GradeRequest(
                f"{i}: {group.prompt.prompt_id}#{j}",
                chat.response_text(rollout.response_ids),
                group.prompt.reference,
                rollout.finish_reason,
            ),
        )
        for i, group in enumerate(groups)
        for j, rollout in enumerate(group.rollouts)
    ]


def answer_format(settings: GradingSettings) -> AnswerFormat:
    """What a response must look like."""
    return AnswerFormat(
        think_start=settings.tokenizer.think_start,
        think_end=settings.tokenizer.think_end,
        require_think=settings.reward.require_think,
    )


def math_graders(settings: GradingSettings, ranks_per_machine: int = 1) -> MathGraderPool:
    """The math graders that the settings ask for."""
    reward = settings.reward
    return MathGraderPool(
        workers=max(1, reward.workers // ranks_per_machine),
        timeout_seconds=reward.timeout_seconds,
        rules=RewardRules(correct=reward.correct, wrong=reward.wrong, malformed=reward.malformed),
        answer_format=answer_format(settings),
    )


def code_graders(
    settings: GradingSettings, ranks_per_machine: int = 1, *, workers: int | None = None
) -> CodeGraderPool:
    """The code graders that the settings ask for.

    Args:
        settings: sections `code_reward`, `reward` and `tokenizer`.
        ranks_per_machine: processes that share a machine's sandboxes.
        workers: sandboxes of this process; default its share of the machine's.
    """
    code = settings.code_reward
    return CodeGraderPool(
        workers=workers or max(1, code.workers // ranks_per_machine),
        sandbox=code.sandbox,
        limits=code_limits(code),
        rules=CodeRewardRules(correct=code.correct, wrong=code.wrong, malformed=code.malformed, score=code.score),
        answer_format=answer_format(settings),
        python=code.python,
        extra_paths=code.extra_paths,
        warm_modules=code.warm_modules,
    )


def code_limits(code: CodeRewardSettings) -> Limits:
    """The limits of one test that the settings ask for."""
    return Limits(
        cpu_seconds=code.cpu_seconds,
        wall_seconds=code.wall_seconds,
        memory_bytes=code.memory_bytes,
        scratch_bytes=code.scratch_bytes,
        file_bytes=code.file_bytes,
        output_bytes=code.output_bytes,
        tasks=code.tasks,
        allow_processes=code.allow_processes,
    )


def require_gradable(data: PromptData, setting: str, settings: Settings) -> None:
    """Refuse prompts that no response to could be graded: unusable tests, or code where no sandbox can be made.

    Args:
        data: prompts of any domain.
        setting: dotted path of the setting that lists their files.
        settings: of the run.

    Raises:
        DataError: names the prompts and what is wrong with their tests.
        ConfigError: no sandbox can be made here; says what to change.
    """
    code = [prompt for prompt in data.prompts if prompt.domain == "code"]
    problems = []
    for prompt in code:
        try:
            parse_problem(prompt.reference)
        except BadTestsError as error:
            problems.append(f"  - {prompt.prompt_id}: {error}")
    if problems:
        more = [f"  ... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        head = f"{setting}: the tests of {len(problems)} code prompts cannot be used:"
        raise DataError("\n".join([head, *problems[:_SHOWN_PROBLEMS], *more]))
    if code:
        require_sandbox(settings)


def require_sandbox(settings: GradingSettings) -> None:
    """Refuse settings whose sandbox cannot be made on this machine, by making it.

    Raises:
        ConfigError: says what to change.
    """
    try:
        with code_graders(settings, workers=1) as pool:
            (grade,) = pool.grade_many([_PROBE], answer_format=AnswerFormat(require_think=False))
    except RewardError as error:
        raise ConfigError([str(error).removeprefix("no code grading worker could be started: ")]) from error
    if grade.outcome != "correct":
        raise ConfigError(
            [f"code_reward: a program that prints 1 cannot be graded within these limits: {grade.reason}"]
        )
