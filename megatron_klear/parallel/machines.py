"""The machines of a launch, and what the first rank has done on each of them without a collective.

A collective needs all ranks at once, and they are training. So the first process of every machine answers calls in
threads: it starts servers there, ends them, and grades. Calls come over a socket of their own; whoever calls proves to
know a key that only this launch knows, before anything that it sends is unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch.distributed as dist

from megatron_klear.errors import RolloutError
from megatron_klear.parallel.first_rank import described, rebuilt
from megatron_klear.records import ParallelContext

log = logging.getLogger(__name__)

Action = Callable[..., Any]
"""Takes a call's arguments and, last, a function to call while it waits, which raises when the caller has gone."""

_WAKE_SECONDS = 0.1
_CONNECT_SECONDS = 20.0
_OFFER_SECONDS = 120.0
_SIGN_SECONDS = 5.0
_SILENCE_SECONDS = 120.0
"""A machine at work on a call says every `_SIGN_SECONDS` that it lives; its process is stopped when it does not."""
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""A machine that has vanished is noticed after a minute and a half, in seconds and probes."""


class SilentMachine(RolloutError):
    """A machine took a call, or was to take it, and did not answer in time."""


class Machines:
    """The machines of a launch, numbered in the order of their ranks (made by all ranks together).

    `LOCAL_RANK` tells which ranks share a machine, as torchrun sets it.

    Args:
        context: the layout.
    """

    def __init__(self, context: ParallelContext) -> None:
        rank, size = context.world.rank, context.world.size
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_leader = local_rank == 0
        """Whether this process answers for its machine."""
        self._actions: dict[str, Action] = {}
        self._offered = threading.Condition()
        self._listener: socket.socket | None = None
        self._key = self._shared_key(size)
        self.address = _address_towards_first()
        if self.is_leader and rank:
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            self._listener = socket.create_server((self.address, 0), family=family)
        port = None if self._listener is None else self._listener.getsockname()[1]
        own = (rank - local_rank, os.getpid(), self.address, port, socket.gethostname())
        everyone: list[Any] = [own]
        if size > 1:
            everyone = [None] * size
            dist.all_gather_object(everyone, own)
        leaders = sorted({leader for leader, *_ in everyone})
        self._places = [everyone[leader][2:4] for leader in leaders]
        self.host_names = tuple(everyone[leader][4] for leader in leaders)
        """As each machine calls itself."""
        self.count = len(leaders)
        """Machines in all."""
        self.number = leaders.index(rank - local_rank)
        """Of this process's machine, counted from 0; the first rank is on machine 0."""
        ends = [*leaders[1:], size]
        self.ranks = tuple(range(first, end) for first, end in zip(leaders, ends, strict=True))
        """On each machine."""
        self.pids = tuple(pid for leader, pid, *_ in everyone if leader == rank - local_rank)
        """The trainer's processes on this machine."""
        if self._listener is not None:
            threading.Thread(target=self._listen, args=(self._listener,), name="calls", daemon=True).start()

    def offer(self, name: str, action: Action) -> None:
        """On a machine's first process: let the first rank call `action` by this name; calls may come before."""
        with self._offered:
            self._actions[name] = action
            self._offered.notify_all()

    def call(
        self,
        machine: int,
        name: str,
        *arguments: Any,
        waiting: Callable[[], None] = lambda: None,
        limit_seconds: float = math.inf,
    ) -> Any:
        """On the first rank, in any thread: have something done on a machine, and return what came of it.

        A machine whose process is stopped is given up after two minutes, whatever the limit.

        Args:
            machine: its number; the first rank's own needs no connection.
            name: of an action that the machine offers.
            arguments: picklable.
            waiting: called while waiting, several times a second; what it raises gives the call up.
            limit_seconds: how long another machine may take; the first rank's own takes what it takes.

        Raises:
            KlearError: what the action raised; RolloutError where the machine gives no answer, SilentMachine where it
                gave none in time.
        """
        if machine == 0:
            return self._action(name)(*arguments, waiting)
        address, port = self._places[machine]
        try:
            with self._connection(address, port) as connection:
                connection.send((name, arguments))
                outcome = _outcome(connection, waiting, limit_seconds)
        except (OSError, EOFError, AuthenticationError) as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            kind = SilentMachine if isinstance(error, TimeoutError | BlockingIOError) else RolloutError
            raise kind(f"machine {machine} ({address}) did not {name}: {what}") from error
        if "kind" in outcome:
            raise rebuilt(outcome)
        return outcome["result"]

    def close(self) -> None:
        """Take no more calls; a second call does nothing."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()

    @staticmethod
    def _shared_key(size: int) -> bytes:
        key = [secrets.token_bytes(32)]
        if size > 1:
            dist.broadcast_object_list(key, src=0)
        return key[0]

    def _connection(self, address: str, port: int) -> Connection:
        opened = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
        opened.settimeout(None)
        connection = _lasting(opened)
        try:
            # The kernel takes calls to a process that is stopped, too.
            if not connection.poll(_CONNECT_SECONDS):
                raise TimeoutError(f"it takes the call and says nothing for {_CONNECT_SECONDS:g} s")
            answer_challenge(connection, self._key)
            deliver_challenge(connection, self._key)
        except BaseException:
            connection.close()
            raise
        return connection

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                if self._listener is None:
                    return
                log.exception("calls of the first rank")
                continue
            threading.Thread(target=self._answer, args=(_lasting(accepted),), name="call", daemon=True).start()

    def _action(self, name: str) -> Action:
        """The action of a name, which a process that is behind the first rank may offer only soon."""
        with self._offered:
            if not self._offered.wait_for(lambda: name in self._actions, _OFFER_SECONDS):
                raise RolloutError(f"nothing of the name {name!r} is offered here")
            return self._actions[name]

    def _answer(self, connection: Connection) -> None:
        """Prove each other, take one call, answer it; in a thread of its own, however long it takes."""
        with contextlib.suppress(OSError, EOFError, AuthenticationError), connection:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            name, arguments = connection.recv()
            with _signs_of_life(connection):
                try:
                    outcome = {"result": self._action(name)(*arguments, lambda: _require_caller(connection))}
                except Exception as error:  # the caller is the one to decide about it
                    outcome = described(error, f"machine {self.number} ({self.address})")
            connection.send(outcome)


@contextlib.contextmanager
def _signs_of_life(connection: Connection) -> Iterator[None]:
    """Tell the caller now and then that this process lives, while it works on a call."""
    is_over = threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError):  # the caller has gone, which the action finds out by itself
            while not is_over.wait(_SIGN_SECONDS):
                connection.send(None)

    telling = threading.Thread(target=tell, name="signs of life", daemon=True)
    telling.start()
    try:
        yield
    finally:
        is_over.set()
        telling.join()


def _outcome(connection: Connection, waiting: Callable[[], None], limit_seconds: float) -> dict[str, Any]:
    """What came of a call.

    Raises:
        TimeoutError: nothing came in time, or no sign of life.
    """
    began = heard = time.monotonic()
    while True:
        if connection.poll(_WAKE_SECONDS):
            outcome: dict[str, Any] | None = connection.recv()
            if outcome is not None:
                return outcome
            heard = time.monotonic()
        waiting()
        now = time.monotonic()
        if now - heard > _SILENCE_SECONDS:
            raise TimeoutError(f"it took the call and gave no sign of life for {_SILENCE_SECONDS:g} s")
        if now - began > limit_seconds:
            raise TimeoutError(f"it took the call and gave no answer within {limit_seconds:g} s")


def _lasting(opened: socket.socket) -> Connection:
    """A connection that is found dead when the other machine has vanished, or takes or gives nothing in midst of it."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        opened.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(_SILENCE_SECONDS), 0))
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(opened.detach())


def _require_caller(connection: Connection) -> None:
    if connection.poll():  # a caller sends nothing more, so this is its end
        raise RolloutError("the first rank does not wait for this any more")


def _address_towards_first() -> str:
    """This machine's address as it reaches the first rank's, IPv4 where there is one; 127.0.0.1 where it is itself."""
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # no such address of this kind, or no way to it
            for *_, place in socket.getaddrinfo(first, 9, family, socket.SOCK_DGRAM):
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect(place)  # sends nothing
                    return str(probe.getsockname()[0])
    return "127.0.0.1"
