"""Grading with the workers of all machines, for the first rank, which has all responses to grade."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from megatron_klear.errors import RewardError, RolloutError
from megatron_klear.parallel import Machines, SilentMachine
from megatron_klear.records import Grade

log = logging.getLogger(__name__)

_CALLS_PER_MACHINE = 2
"""While one waits for its slowest response, the workers have those of the other."""


class GraderPool(Protocol):
    """Grades responses in processes of its own; from any thread."""

    def grade_many(self, requests: Sequence[Any]) -> list[Grade]:
        """Grades in the order of the requests; what a request is, the pool knows."""
        ...

    def close(self) -> None:
        """End the processes; a second call does nothing."""
        ...


class MachineGraders:
    """The grading workers of every machine as one pool; made on every rank, and it grades on the first.

    Args:
        machines: of the launch.
        pool: this machine's workers; None on all but its first process.
        workers: in each pool.
        limit_seconds: how long another machine may take over `workers` responses, at most, before it is asked no more.
    """

    def __init__(
        self, machines: Machines, pool: GraderPool | None, *, workers: int, limit_seconds: float = math.inf
    ) -> None:
        self._machines, self._pool, self._workers = machines, pool, workers
        self._limit_seconds = limit_seconds
        self._silent: set[int] = set()
        self._is_closed = threading.Event()
        if pool is not None:
            machines.offer("grade", lambda requests, _: pool.grade_many(requests))

    def grade_many(self, requests: Sequence[Any]) -> list[Grade]:
        """Grades in the order of the requests, on whichever machine has workers left; see `Graders`.

        Raises:
            RewardError: no machine could grade what is left.
        """
        count = self._machines.count
        if count == 1:
            assert self._pool is not None
            return self._pool.grade_many(requests)
        size = max(1, min(self._workers, -(-len(requests) // (_CALLS_PER_MACHINE * count))))
        left = deque((at, requests[at : at + size]) for at in range(0, len(requests), size))
        grades: list[Grade | None] = [None] * len(requests)
        problems: list[str] = []
        done = threading.Lock()

        def work(machine: int) -> None:
            while True:
                with done:
                    if not left:
                        return
                    at, some = left.popleft()
                try:
                    found = self._call(machine, some)
                except (RewardError, RolloutError) as error:
                    log.warning("machine %d grades no more of these responses: %s", machine, error)
                    with done:
                        left.appendleft((at, some))
                        problems.append(f"machine {machine}: {error}")
                    return
                grades[at : at + len(some)] = found

        asked = [machine for machine in range(count) if machine not in self._silent]
        with ThreadPoolExecutor(_CALLS_PER_MACHINE * count, thread_name_prefix="grade") as threads:
            list(threads.map(work, asked * _CALLS_PER_MACHINE))
        # What a machine gave back after the others had finished.
        for at, some in left:
            grades[at : at + len(some)] = self._anywhere(some, problems)
        assert all(grade is not None for grade in grades)
        return [grade for grade in grades if grade is not None]

    def _anywhere(self, requests: Sequence[Any], problems: list[str]) -> list[Grade]:
        """Grades by the first machine that can; why others cannot is added to `problems`."""
        for machine in range(self._machines.count):
            if machine in self._silent:
                continue
            try:
                return self._call(machine, requests)
            except (RewardError, RolloutError) as error:
                problems.append(f"machine {machine}: {error}")
        raise RewardError("no machine can grade: " + "; ".join(sorted(set(problems))))

    def _call(self, machine: int, requests: Sequence[Any]) -> list[Grade]:
        """Grades by one machine, which is not asked again once it has let its time pass."""
        try:
            found: list[Grade] = self._machines.call(
                machine, "grade", requests, waiting=self._require_open, limit_seconds=self._limit_seconds
            )
        except SilentMachine as error:
            self._silent.add(machine)
            limit = f"reward.machine_seconds = {self._limit_seconds:g}"
            raise RolloutError(f"{error}; it is not asked again in this run ({limit})") from error
        return found

    def _require_open(self) -> None:
        if self._is_closed.is_set():
            raise RolloutError("the graders were closed")

    def close(self) -> None:
        """End this machine's workers, and calls to others; a second call does nothing."""
        self._is_closed.set()
        if self._pool is not None:
            self._pool.close()
