"""SGLang's servers on all machines of the trainer, commanded by the first rank."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from megatron_klear.errors import ConfigError, KlearError, RolloutError
from megatron_klear.parallel import Machines
from megatron_klear.rollout.sglang import ServerFleet, StartReport
from megatron_klear.session.start_counts import StartCounts

_WAKE_SECONDS = 0.2
_COUNT_SECONDS = 1.0


def require_reachable(host: str, host_names: Sequence[str]) -> None:
    """Require that the first machine reaches what listens on an address of every machine.

    Args:
        host: `sglang.host`.
        host_names: of the machines.

    Raises:
        ConfigError: each would listen to itself only.
    """
    to_itself = host in ("localhost", "::1") or host.startswith("127.")
    if to_itself and len(set(host_names)) > 1:
        others = ", ".join(name for name in host_names[1:4])
        text = f"sglang.host: got {host}, where servers on {others} would hear only their own machine"
        raise ConfigError([f"{text}; set auto or 0.0.0.0"])


class MachineFleets:
    """One fleet of servers per machine, numbered together, machine by machine; made on every rank.

    A machine's first process starts the servers there, and they end with it and with any other of the trainer's
    processes on that machine. The first rank alone uses the methods, but for `close`.

    Args:
        machines: of the launch.
        make: makes this machine's fleet when it is wanted.
    """

    def __init__(self, machines: Machines, make: Callable[[], ServerFleet]) -> None:
        self._machines, self._make = machines, make
        self._fleet: ServerFleet | None = None
        self._is_closed = False
        self._making = threading.Lock()
        self._places: list[tuple[int, int]] = []
        self._urls: list[str] = []
        self.failed: dict[int, str] = {}
        """Servers, by number, that did not start, and why."""
        if machines.is_leader:
            machines.offer("start its servers", lambda most, waiting: self._here().start_most(most, waiting))
            machines.offer("count its servers", lambda _: self._here().started())
            machines.offer("look after its servers", self._look_after_here)
            machines.offer("start a server", lambda index, _: self._here().start(index))
            machines.offer("end a server", lambda index, _: self._here().stop(index))
            machines.offer("wait for a server", self._wait_here)

    def start_all(
        self,
        waiting: Callable[[], None],
        least: int | None = None,
        on_ready: Callable[[int], None] = lambda more: None,
    ) -> list[str]:
        """Start all servers of all machines at once and wait until each answers, or has failed.

        Args:
            waiting: called while waiting, several times a second.
            least: how few servers will do; None needs all of them.
            on_ready: called with how many more are ready, each time that some are.

        Returns:
            their URLs, in order; those in `failed` do not answer.

        Raises:
            ConfigError: no SGLang environment on a machine, too few GPUs, or a fixed port that is taken.
            RolloutError: too many servers ended or are not ready in time; carries the ends of their logs.
        """
        here = self._here()  # writes what the others read
        count = self._machines.count
        total = count * here.size
        report = StartReport(total, here.start_seconds, "sglang.start_seconds", on_ready=on_ready)
        counts = StartCounts(total, least, report)
        given_up, is_over = threading.Event(), threading.Event()

        def between() -> None:
            if given_up.is_set():
                raise RolloutError("servers elsewhere cannot be started")

        def count_on(machine: int) -> None:
            while not is_over.wait(_COUNT_SECONDS):
                with suppress(KlearError):  # the call that starts them tells what is wrong with a machine
                    counts.take(machine, *self._machines.call(machine, "count its servers", waiting=between))

        with ThreadPoolExecutor(2 * count, thread_name_prefix="start servers") as threads:
            # A machine does not know of the others' failures; together they are counted below.
            most = 0 if least is None else 10**6
            calls = [
                threads.submit(self._machines.call, m, "start its servers", most, waiting=between) for m in range(count)
            ]
            for machine in range(count):
                threads.submit(count_on, machine)
            try:
                left = set(calls)
                while left:
                    ended, left = concurrent.futures.wait(left, timeout=_WAKE_SECONDS)
                    for call in ended:
                        call.result()
                    counts.look()
                    waiting()
                is_over.set()
                found: list[list[tuple[str, str]]] = [call.result() for call in calls]
                for machine, served in enumerate(found):
                    problems = [problem for _, problem in served if problem]
                    counts.take(machine, len(served) - len(problems), problems)
                counts.look()
            except BaseException:
                given_up.set()
                self.close()  # as every other rank does when it is told of the failure
                raise
            finally:
                is_over.set()
        self._places = [(machine, index) for machine, served in enumerate(found) for index in range(len(served))]
        servers = [server for served in found for server in served]
        self._urls = [url for url, _ in servers]
        self.failed = {number: problem for number, (_, problem) in enumerate(servers) if problem}
        return list(self._urls)

    def require_running(self, seconds: float, waiting: Callable[[], None]) -> None:
        """Require that every server still runs; see `ServerFleet.require_running`."""
        deadline = time.monotonic() + seconds
        for machine in range(self._machines.count):
            left = max(deadline - time.monotonic(), 0.0)
            self._machines.call(machine, "look after its servers", left, waiting=waiting)

    def start(self, index: int) -> None:
        """Start server number `index` anew, on a port of its own; it is not ready yet.

        Raises:
            KlearError: as `ServerFleet.start`, or its machine gives no answer.
        """
        machine, local = self._places[index]
        self._machines.call(machine, "start a server", local)

    def wait_ready(self, index: int, waiting: Callable[[], None]) -> None:
        """Wait until a server that was started answers; see `ServerFleet.wait_ready`."""
        machine, local = self._places[index]
        self._urls[index] = self._machines.call(machine, "wait for a server", local, waiting=waiting)

    def stop(self, index: int) -> str | None:
        """End server number `index` and all its processes, and tell how it had ended; see `ServerFleet.stop`."""
        machine, local = self._places[index]
        ended: str | None = self._machines.call(machine, "end a server", local)
        return ended

    def place(self, index: int) -> tuple[int, int]:
        """Machine of server number `index`, and its number among the servers there."""
        return self._places[index]

    def url(self, index: int) -> str:
        """Where server number `index` answers, once it was ready."""
        return self._urls[index]

    def close(self) -> None:
        """End this machine's servers; a second call does nothing, and none is started after it."""
        with self._making:
            self._is_closed = True
        if self._fleet is not None:
            self._fleet.close()

    def _here(self) -> ServerFleet:
        with self._making:
            if self._is_closed:
                raise RolloutError("no server is started: the run is ending")
            if self._fleet is None:
                self._fleet = self._make()
            return self._fleet

    def _look_after_here(self, seconds: float, waiting: Callable[[], None]) -> None:
        self._here().require_running(seconds, waiting)

    def _wait_here(self, index: int, waiting: Callable[[], None]) -> str:
        fleet = self._here()
        fleet.wait_ready(index, waiting)
        return fleet.url(index)
