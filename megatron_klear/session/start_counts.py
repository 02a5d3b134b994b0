"""Servers that start on several machines, as the first rank knows of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.sglang import StartReport

log = logging.getLogger(__name__)


class StartCounts:
    """Adds up what the machines tell, while they start their servers.

    Args:
        total: servers on all machines.
        least: how few will do; None where each machine needs all of its own.
        report: told of the sums.
    """

    def __init__(self, total: int, least: int | None, report: StartReport) -> None:
        self._total, self._least, self._report = total, least, report
        self._found: dict[int, tuple[int, Sequence[str]]] = {}
        self._told: set[str] = set()

    def take(self, machine: int, ready: int, problems: Sequence[str]) -> None:
        """Take how many of a machine's servers are ready, and what is wrong with those that failed."""
        before, failed = self._found.get(machine, (0, ()))
        if ready + len(problems) >= before + len(failed):  # of two counts the older may come last
            self._found[machine] = ready, problems

    def look(self) -> None:
        """Report the sums.

        Raises:
            RolloutError: too many servers have failed; says of each why.
        """
        found = list(self._found.values())
        problems = [problem for _, of_machine in found for problem in of_machine]
        if self._least is not None and self._total - len(problems) < self._least:
            few = f"{len(problems)} of {self._total} servers did not start, and scheduling.min_engines is"
            raise RolloutError("\n".join([f"{few} {self._least}:", *problems]))
        self._report.note(sum(ready for ready, _ in found), f"{len(problems)} failed" if problems else "")
        for problem in problems:
            if problem not in self._told:
                self._told.add(problem)
                log.warning("%s", problem)
