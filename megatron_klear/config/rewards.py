"""Settings of the rewards: what an answer is worth, and the limits of grading it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_klear.config.fields import SECTION, Positive, Seconds, Unit

_Bytes = Unit("bytes")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class RewardSettings:
    """What a graded response is worth, and the limits of grading."""

    correct: float = 1.0
    """Reward of a correct answer."""

    wrong: float = -1.0
    """Reward of a wrong or missing answer; below `reward.correct`."""

    malformed: float = -1.0
    """Reward of a response whose thinking tags are missing or misplaced, right or not; at most `reward.wrong`."""

    require_think: bool = True
    """Judge the thinking tags, in code answers too; false reads the answer from the whole response without tags. A tag
    with which the chat template ends every prompt is the response's opening tag."""

    timeout_seconds: Seconds = 5.0
    """CPU time for grading one math response: past it the answer is wrong, or ungraded when the reference is to blame.
    Ten times that on the clock, past which it is ungraded and takes no part in training."""

    workers: Annotated[int, Unit("processes"), Positive] = 4
    """Grader processes per machine, for math."""

    machine_seconds: Seconds = 1800.0
    """Training on several machines: how long another machine may take to grade what it is given at a time, a response
    per worker, before others grade it and that machine is asked no more."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class CodeRewardSettings:
    """What a code answer is worth, and the sandbox that runs it; a test that passes a limit is failed."""

    score: Literal["soft", "hard"] = "soft"
    """soft: the share of tests passed (Section 3.2.4), from `code_reward.wrong` to `.correct`; hard: all or nothing."""

    correct: float = 1.0
    """Reward of an answer that passes all tests."""

    wrong: float = 0.0
    """Reward of an answer that passes none, or is no program; below `code_reward.correct`."""

    malformed: float = 0.0
    """Reward of a response whose thinking tags are missing or misplaced; at most `code_reward.wrong`."""

    sandbox: Literal["bubblewrap", "rlimits"] = "bubblewrap"
    """bubblewrap: namespaces, limits and a system call filter; rlimits: the latter two only, code can read files."""

    workers: Annotated[int, Unit("sandboxes"), Positive] = 4
    """Sandboxes per machine, each with a program running in it at a time."""

    python: Annotated[str, Field(min_length=1)] = "/usr/bin/python3"
    """Interpreter that runs the answers, 3.10 or later; only its files are seen in the sandbox."""

    extra_paths: tuple[str, ...] = ()
    """Folders that answers may also read and import from, such as a site-packages with numpy."""

    warm_modules: tuple[str, ...] = ()
    """Modules that every sandbox imports once, so that answers find them loaded."""

    cpu_seconds: Annotated[float, Unit("seconds"), Field(gt=0, le=600)] = 6.0
    """CPU time of one test, so that a grade does not depend on how busy the machine is. Ten times that by the clock,
    past which an answer that others kept from running is ungraded and takes no part in training."""

    wall_seconds: Annotated[float, Unit("seconds"), Field(gt=0, le=3600)] = 20.0
    """Time of one test by the clock, for answers that sleep or wait; at least `code_reward.cpu_seconds`. Time in which
    an answer is ready to run and others run does not count, except with `code_reward.allow_processes`."""

    memory_bytes: Annotated[int, _Bytes, Field(ge=2**26)] = 2**30
    """Address space of a test's process."""

    scratch_bytes: Annotated[int, _Bytes, Field(ge=2**16)] = 2**26
    """What the scratch folder, the only place that can be written to, may hold."""

    file_bytes: Annotated[int, _Bytes, Field(ge=2**12)] = 2**25
    """Largest file."""

    output_bytes: Annotated[int, _Bytes, Field(ge=2**10, le=2**27)] = 2**22
    """Most that a test may print, and as much to stderr; at least what the longest expected output needs."""

    tasks: Annotated[int, Unit("threads"), Field(ge=1, le=1024)] = 32
    """Threads, and processes where they are allowed, that a test may have at a time."""

    allow_processes: bool = False
    """Let answers start processes; each then has `code_reward.memory_bytes`, and the limit by the clock holds on a busy
    machine, too. Needs bubblewrap."""
