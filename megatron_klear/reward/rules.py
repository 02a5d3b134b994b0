"""What an outcome is worth and what a well-formed response looks like: the settings of the reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from megatron_klear.errors import ConfigError
from megatron_klear.records import Grade, Outcome


class Verdict(NamedTuple):
    """Outcome of one answer, before rewards; `reason` is for people.

    Attributes:
        pass_rate: share of the tests that a code answer passed; None for math.
        tests: fingerprint of those tests, see `Grade`.
    """

    outcome: Outcome
    reason: str
    pass_rate: float | None = None
    tests: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRules:
    """Reward of each outcome of a math answer; the paper's scheme is binary, positive or negative (Section 3.2.4).

    Eq. 4 centres and scales rewards within a group, so only their order and relative distance matter there.

    Attributes:
        correct: the boxed answer equals the reference.
        wrong: the thinking is well formed and the answer is not equal to the reference, or there is none.
        malformed: the thinking part is not enclosed once in its tags, whatever the answer says. Never above
            `wrong`: a response cut off while thinking must not beat one that finished with a wrong answer.

    Raises:
        ConfigError: a value is not finite, or the order `correct > wrong >= malformed` is broken.
    """

    correct: float = 1.0
    wrong: float = -1.0
    malformed: float = -1.0

    def __post_init__(self) -> None:
        _require_order("reward", self.correct, self.wrong, self.malformed)

    def grade(self, outcome: Outcome, reason: str) -> Grade:
        """The `Grade` of a math outcome; `ungraded` is worth 0.0 and must be masked out by the caller.

        Raises:
            ValueError: `outcome` is `partial`, which no math answer can have.
        """
        if outcome == "ungraded":
            return Grade(outcome=outcome, reward=0.0, reason=reason)
        values: dict[str, float] = {"correct": self.correct, "wrong": self.wrong, "malformed": self.malformed}
        if outcome not in values:
            raise ValueError(f"a math answer is {', '.join(values)} or ungraded, got {outcome!r}")
        return Grade(outcome=outcome, reward=float(values[outcome]), reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeRewardRules:
    """Reward of a code answer, from the share of tests that it passes (Section 3.2.4).

    Equation: soft: wrong + (correct - wrong) * passed / tests, which is the share itself with the defaults.

    Attributes:
        correct: all tests are passed.
        wrong: none is, or there is no program.
        malformed: the thinking part is not enclosed once in its tags. Never above `wrong`.
        score: `soft`, or `hard` for all or nothing: one failed test is worth `wrong`.

    Raises:
        ConfigError: a value is not finite, or the order `correct > wrong >= malformed` is broken.
    """

    correct: float = 1.0
    wrong: float = 0.0
    malformed: float = 0.0
    score: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        _require_order("code_reward", self.correct, self.wrong, self.malformed)

    def grade(self, verdict: Verdict) -> Grade:
        """The `Grade` of a verdict; `ungraded` is worth 0.0 and must be masked out by the caller."""
        outcome, rate = verdict.outcome, verdict.pass_rate or 0.0
        if outcome == "partial" and self.score == "hard":
            outcome = "wrong"
        rewards: dict[str, float] = {
            "correct": self.correct,
            "partial": self.wrong + (self.correct - self.wrong) * rate,
            "wrong": self.wrong,
            "malformed": self.malformed,
            "ungraded": 0.0,
        }
        return Grade(outcome=outcome, reward=float(rewards[outcome]), reason=verdict.reason, tests=verdict.tests)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    r"""What a response must look like to be graded.

    Where the chat template ends prompts with `think_start`, that is the beginning of the response's text.

    Attributes:
        think_start, think_end: markers around the thinking part, as they appear in decoded text.
        require_think: a response without any marker is malformed; if False, such a response is all answer.
        require_box: only the last `\boxed{...}` after the thinking part counts; if False and there is no box,
            math-verify looks for the last expression of the answer text, which guesses more often.
        max_answer_chars: a longer boxed answer is wrong without being parsed; a longer reference is ungraded.

    Raises:
        ConfigError: a marker is empty, both are the same, or the length limit is outside 1 .. 8192.
    """

    think_start: str = "<think>"
    think_end: str = "</think>"
    require_think: bool = True
    require_box: bool = True
    max_answer_chars: int = 4096

    def __post_init__(self) -> None:
        problems = []
        for name in ("think_start", "think_end"):
            if not getattr(self, name).strip():
                problems.append(f"tokenizer.{name}: must not be empty")
        if not problems and (self.think_start in self.think_end or self.think_end in self.think_start):
            problems.append("tokenizer.think_end: must differ from tokenizer.think_start, neither inside the other")
        if not 1 <= self.max_answer_chars <= 8192:
            # The upper bound keeps a question small enough to fit into a socket's buffer.
            problems.append(f"characters of a graded answer: must be between 1 and 8192, got {self.max_answer_chars}")
        if problems:
            raise ConfigError(problems)


def _require_order(section: str, correct: float, wrong: float, malformed: float) -> None:
    values = {"correct": correct, "wrong": wrong, "malformed": malformed}
    problems = [f"{section}.{k}: must be a finite number, got {v}" for k, v in values.items() if not math.isfinite(v)]
    if not problems:
        if not correct > wrong:
            problems.append(f"{section}.correct: must be above {section}.wrong ({wrong}), got {correct}")
        if malformed > wrong:
            problems.append(f"{section}.malformed: must not exceed {section}.wrong ({wrong}), got {malformed}")
    if problems:
        raise ConfigError(problems)


def count_outcomes(grades: Iterable[Grade]) -> dict[Outcome, int]:
    """How many grades have each outcome; every outcome is a key, also those that did not occur."""
    counts = Counter(grade.outcome for grade in grades)
    return {outcome: counts[outcome] for outcome in get_args(Outcome)}
