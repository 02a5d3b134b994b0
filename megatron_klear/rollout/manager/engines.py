"""The engines as the manager sees them, and the choice of the one that gets the next responses."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.manager.work import Request

EngineStatus = Literal["serving", "checked", "starting", "down", "given up"]
"""`checked`: a request failed and the engine is being asked whether it lives. `starting`: it is being restarted."""


@dataclass(slots=True, eq=False)
class Engine:
    """One engine.

    Attributes:
        number: its place in the list of engines.
        endpoint: how to reach it; another one after a restart.
        status: only `serving` engines get requests.
        requests: in flight, by id.
        last_progress: loop time of the newest token of any request, or of becoming busy.
        has_answered: it brought a token since it was started; before, it may be compiling.
        failures: in a row; requests that fail together count once.
        restarts: in a row without a whole response in between.
        is_of_others: nobody here starts it, as its last restart showed.
        unanswered: checks in a row without an answer, while it had no requests.
        is_asked: such a check is under way.
        last_error: why it was last in trouble.
        last_end: how its process had ended by itself, found at one of the last restarts in a row; may be unknown.
        down_since: loop time.
        let_in_at: loop time at which it could take requests again.
        tokens: brought in all.
        slow_windows: measurements in a row in which it was slow.
        is_slow: it gets one request at a time until it is quick again.
        is_leaving: it is slow, gets no more requests, and is started anew when it has handed over those that it has.
        slow_restarts: how often in a row it was started anew for being slow.
        measured_tokens, measured_rate: tokens at the last measurement; tokens per second and request then.
        known_rate: the newest `measured_rate` of a time when it had requests.
    """

    number: int
    endpoint: Endpoint
    status: EngineStatus = "serving"
    requests: dict[str, Request] = field(default_factory=dict)
    last_progress: float = 0.0
    has_answered: bool = False
    failures: int = 0
    restarts: int = 0
    is_of_others: bool = False
    unanswered: int = 0
    is_asked: bool = False
    last_error: str = ""
    last_end: str = ""
    down_since: float = 0.0
    let_in_at: float = -math.inf
    tokens: int = 0
    slow_windows: int = 0
    is_slow: bool = False
    is_leaving: bool = False
    slow_restarts: int = 0
    measured_tokens: int = 0
    measured_rate: float | None = None
    known_rate: float | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.endpoint.name

    @property
    def outstanding(self) -> int:
        """Requests in flight."""
        return len(self.requests)


class EnginePool:
    """All engines; `pick` gives the serving one with the fewest requests.

    Args:
        endpoints: one per engine.
        most_requests: on one engine at a time.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, most_requests: int) -> None:
        self.engines = [Engine(number=i, endpoint=endpoint) for i, endpoint in enumerate(endpoints)]
        self._most = most_requests
        self._turn = itertools.count()
        # Entries whose load is no longer the engine's are passed over when they come up.
        self._heap: list[tuple[int, int, int]] = []
        for engine in self.engines:
            self.offer(engine)

    def __iter__(self) -> Iterator[Engine]:
        return iter(self.engines)

    def serving(self) -> list[Engine]:
        """Engines that get requests."""
        return [engine for engine in self.engines if engine.status == "serving"]

    def room(self, engine: Engine) -> int:
        """Requests that an engine can still take."""
        if engine.status != "serving" or engine.is_leaving:
            return 0
        return (1 if engine.is_slow else self._most) - engine.outstanding

    def offer(self, engine: Engine) -> None:
        """Note that an engine has room, or has another load than before."""
        if self.room(engine) > 0:
            heapq.heappush(self._heap, (engine.outstanding, next(self._turn), engine.number))
            if len(self._heap) > 64 + 16 * len(self.engines):
                self._heap = [(e.outstanding, next(self._turn), e.number) for e in self.engines if self.room(e) > 0]
                heapq.heapify(self._heap)

    def pick(self, *, near: Engine | None, avoid: Engine | None, spread: int) -> Engine | None:
        """The engine for a group's next responses; None when all are full.

        Args:
            near: where others of the group are; it is taken unless it has `spread` more requests than the least.
            avoid: taken only when it is the only one with room.
            spread: see `near`.
        """
        least = self._least(None)
        if least is None:
            return None
        is_usable = near is not None and near is not avoid and self.room(near) > 0
        if near is not None and is_usable and near.outstanding <= least.outstanding + spread:
            return near
        if least is avoid:
            return self._least(avoid) or least
        return least

    def _least(self, other_than: Engine | None) -> Engine | None:
        """The least loaded engine with room; its entry stays in the heap."""
        put_back = []
        found = None
        while self._heap:
            load, _, number = self._heap[0]
            engine = self.engines[number]
            if engine.outstanding != load or self.room(engine) <= 0:
                heapq.heappop(self._heap)
            elif engine is other_than:
                put_back.append(heapq.heappop(self._heap))
            else:
                found = engine
                break
        for entry in put_back:
            heapq.heappush(self._heap, entry)
        return found
