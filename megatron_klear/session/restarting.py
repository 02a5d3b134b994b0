"""Servers that were lost: back beside the training, with the weights of the last publish."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from megatron_klear.errors import ConfigError, KlearError, RolloutError
from megatron_klear.rollout.endpoint import Endpoint
from megatron_klear.rollout.manager import StartLimit
from megatron_klear.rollout.sglang import ConnectedEngine, SglangEngine
from megatron_klear.session.fleets import MachineFleets
from megatron_klear.session.others import ServersOfOthers
from megatron_klear.session.turn import Turn
from megatron_klear.weight_sync import EngineGroup

log = logging.getLogger(__name__)

_WAKE_SECONDS = 0.2
_REST = 9.0
"""So many times as long as a try took that failed nobody waits for the next one, while other servers work."""

BringUp = Callable[[ConnectedEngine, Callable[[], None]], None]
"""Loads the current weights into a fresh engine and proves them; calls its second argument while it waits."""


class EngineRestarts:
    """Starts lost servers anew for the rollout manager; on the first rank.

    A server is started while the trainer goes on. It gets its weights, and joins those that are published to, while
    nothing is published: so it has missed nothing.

    Args:
        fleet: started the servers, or waits for those of others.
        engine: generates on them for evaluation.
        group: those that are published to.
        bring_up: see `BringUp`.
        turn: when servers may start, where they share GPUs with the trainer.
    """

    def __init__(
        self,
        fleet: MachineFleets | ServersOfOthers,
        engine: SglangEngine,
        group: EngineGroup,
        bring_up: BringUp,
        turn: Turn | None = None,
    ) -> None:
        self._fleet, self._engine, self._group, self._bring_up = fleet, engine, group, bring_up
        self._turn = turn
        self._numbers: dict[int, tuple[int, Endpoint]] = {}  # by id, which no other object gets while it stands here
        self._publishing = threading.Lock()
        self._one_at_a_time = [threading.Lock() for _ in engine.engines]
        self._ends: dict[int, str] = {}
        self._next_try: dict[int, float] = {}
        self._closed, self._is_ending = threading.Event(), threading.Event()
        # Threads of its own: a server takes minutes to start, and the manager's threads write the ledger meanwhile.
        self._threads = ThreadPoolExecutor(len(engine.engines), thread_name_prefix="restart")

    def endpoints(self) -> list[Endpoint]:
        """Ways to all servers for the manager's event loop, by which it names them to `restart`."""
        return [self._endpoint(index) for index in range(len(self._engine.engines))]

    @contextmanager
    def publishing(self, waiting: Callable[[], None], *, is_urgent: Callable[[], bool] = bool) -> Iterator[None]:
        """Around a publish: no server joins meanwhile.

        Args:
            waiting: called while a server that joins is waited for, several times a second.
            is_urgent: asked then; whether to wait no longer, as the run is about to stop: restarts are given up.
        """
        while not self._publishing.acquire(timeout=_WAKE_SECONDS):
            waiting()
            if is_urgent():
                self._is_ending.set()
        try:
            yield
        finally:
            self._publishing.release()

    async def restart(self, endpoint: Endpoint, why: str, limit: StartLimit) -> Endpoint:
        """Start a lost server anew with current weights; called in the manager's event loop.

        Its turn and the end of a publish are waited for outside of the limit.

        Raises:
            KlearError: it does not start, or cannot be given the weights of the last publish.
        """
        index, _ = self._numbers[id(endpoint)]
        given_up = threading.Event()
        log.warning("%s is to come back: %s", endpoint.name, why)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._restart, index, given_up, limit)
        except asyncio.CancelledError:
            given_up.set()
            raise
        except KlearError as error:
            log.warning("%s cannot be used again: %s", endpoint.name, error)
            raise
        await endpoint.close()
        del self._numbers[id(endpoint)]
        return self._endpoint(index)

    def may_come_back(self, index: int) -> bool:
        """Whether to try `restart_here` while other servers work, which wait for it meanwhile.

        Not of a server of others that is not there, nor soon after a try that failed: such tries take a tenth of the
        time at most.
        """
        is_there = not isinstance(self._fleet, ServersOfOthers) or self._fleet.is_there(index)
        return is_there and time.monotonic() >= self._next_try.get(index, 0.0)

    def restart_here(self, index: int, why: str, waiting: Callable[[], None], seconds: float) -> None:
        """Start a lost server anew in this thread, where nobody else restarts or publishes.

        Args:
            index: of the server.
            why: it is lost, as in "does not answer".
            waiting: called meanwhile, several times a second.
            seconds: how long it may take.

        Raises:
            KlearError: it does not start in time, or cannot be given the weights of the last publish.
        """
        name, began = self._engine.engines[index].endpoint.name, time.monotonic()
        deadline = began + seconds

        def wait() -> None:
            waiting()
            if time.monotonic() > deadline:
                raise RolloutError(f"{name} did not come back within {seconds:.0f} s (sglang.start_seconds)")

        log.warning("%s %s and is to come back", name, why)
        ended = self._fleet.stop(index)
        if ended is not None:
            log.warning("%s %s", name, ended)
        self._group.leave(self._engine.engines[index].caller)
        try:
            self._fleet.start(index)
            self._fleet.wait_ready(index, wait)
            fresh = self._joined(index, self._engine.connect(index, self._fleet.url(index)), wait)
        except BaseException as error:
            if isinstance(error, KlearError):
                self._next_try[index] = time.monotonic() + _REST * (time.monotonic() - began)
            if isinstance(self._fleet, ServersOfOthers):
                raise
            # It serves nobody, and holds memory that may be the trainer's from now on, as when the run is to stop.
            ended = self._fleet.stop(index)
            if not isinstance(error, ConfigError):
                raise
            # Our own was started with settings that had been right: it has ended, or lost its port, and none is wrong.
            raise RolloutError(
                f"{name} cannot be brought back: {error}" + (f"; it {ended}" if ended else "")
            ) from error
        self._next_try.pop(index, None)
        log.info("%s is back with the current weights", fresh.endpoint.name)

    def note_end(self, index: int, how: str) -> None:
        """Take how a server had ended that was ended elsewhere, for the restart to tell: that is told only once."""
        self._ends[index] = how

    def close(self) -> None:
        """Give up what is being started, and wait for that; the servers themselves are the fleet's."""
        self._closed.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _endpoint(self, index: int) -> Endpoint:
        made = self._engine.another_endpoint(index)
        self._numbers[id(made)] = (index, made)
        return made

    def _restart(self, index: int, given_up: threading.Event, limit: StartLimit) -> None:
        """In a thread: end what is left of the server, start it, bring it up to date, let it join."""

        def waiting() -> None:
            is_urgent = self._turn is not None and self._turn.is_urgent
            is_over = self._closed.is_set() or self._is_ending.is_set()
            if given_up.is_set() or is_over or is_urgent:
                raise RolloutError(f"the restart of server {index} was given up")

        began = time.monotonic()
        with self._one_at_a_time[index]:
            waiting()
            self._stop(index, limit)  # a publish that waits for an answer of it goes on without
            with _after_others(self.publishing(waiting), limit):
                self._group.leave(self._engine.engines[index].caller)
            with nullcontext() if self._turn is None else _after_others(self._turn.starting(waiting), limit):
                try:
                    fresh = self._start(index, waiting, limit)
                except BaseException:
                    if not (isinstance(self._fleet, ServersOfOthers) or self._closed.is_set()):
                        # It serves nobody, perhaps to the end of the run, and holds its GPUs and memory, which may be
                        # the trainer's from now on.
                        self._stop(index, limit)
                    raise
        log.info("%s is back with the current weights after %.0f s", fresh.endpoint.name, time.monotonic() - began)

    def _stop(self, index: int, limit: StartLimit) -> None:
        """End what is left of a server, and tell what it died of where it had ended by itself."""
        ended = self._fleet.stop(index) or self._ends.pop(index, None)
        if ended is not None:
            log.warning("%s %s", self._engine.engines[index].endpoint.name, ended)
            limit.tell_end(ended)

    def _start(self, index: int, waiting: Callable[[], None], limit: StartLimit) -> ConnectedEngine:
        """Start a server, and have it join with the weights of the last publish."""
        self._fleet.start(index)
        with limit.absent() if isinstance(self._fleet, ServersOfOthers) else nullcontext():
            self._fleet.wait_ready(index, waiting)
        fresh = self._engine.connect(index, self._fleet.url(index))  # which no publish need wait for
        with _after_others(self.publishing(waiting), limit):
            return self._joined(index, fresh, waiting)

    def _joined(self, index: int, fresh: ConnectedEngine, waiting: Callable[[], None]) -> ConnectedEngine:
        """A server that is ready, with the weights of the last publish, and published to from now on."""
        self._bring_up(fresh, waiting)
        waiting()  # whoever has given it up would not use it, and yet it would be published to
        self._engine.replace(index, fresh)
        self._group.take_in(fresh.caller)
        return fresh


@contextmanager
def _after_others(entered: AbstractContextManager[None], limit: StartLimit) -> Iterator[None]:
    """Inside of what is entered only when others are done with it; that wait is not the server's."""
    with ExitStack() as inside:
        with limit.waiting_for_others():
            inside.enter_context(entered)
        yield
