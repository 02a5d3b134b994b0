"""Errors that a person can act on, and the exit status of every entry.

An entry that catches one of these prints its message and no traceback: the message says what was
found, what is allowed, and which setting to change.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75


class KlearError(Exception):
    """Base of all errors whose message is meant for the user; `exit_status` is what an entry returns."""

    exit_status = EXIT_FAILED


class ConfigError(KlearError):
    """Settings that cannot work.

    Args:
        problems: one text per problem, each starting with the dotted path of the setting.
    """

    exit_status = EXIT_BAD_INPUT

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem with the settings:" if count == 1 else f"{count} problems with the settings:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class DataError(KlearError):
    """Input files that are missing, empty or malformed; names file and line."""

    exit_status = EXIT_BAD_INPUT


class RolloutError(KlearError):
    """Generation failed or answered something that cannot be trained on."""


class RewardError(KlearError):
    """The graders as a whole do not work (a single answer that cannot be graded is not an error)."""


class WeightSyncError(KlearError):
    """An engine's weights are not the trainer's; names the tensors."""


class CheckpointError(KlearError):
    """A checkpoint cannot be written, read or converted; names what is missing or damaged."""


class TrainingError(KlearError):
    """A loss or gradient is not finite; raised before the optimizer step, names step and sequences."""


class MismatchError(TrainingError):
    """Engine and trainer disagree on log-probabilities past a setting; says by how much and where it comes from."""
