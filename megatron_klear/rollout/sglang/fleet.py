"""The servers that a run starts: as many as the settings say, each with a port, a log and a place in the fleet."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import re
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.observe.replace import replace_file
from megatron_klear.rollout.sglang.command import server_command, server_environment
from megatron_klear.rollout.sglang.process import ServerProcess

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_PORT_ATTEMPTS = 3
_PORT_TAKEN = re.compile(r"address already in use|port .*(in use|not available)", re.IGNORECASE)

_fleets: weakref.WeakSet[ServerFleet] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for fleet in list(_fleets):
        fleet.close()


class StartFailed(RolloutError):
    """A server ended, or did not answer in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlace:
    """Where among the machines of a launch a fleet is.

    Attributes:
        first_number: of its servers among all, for names of logs.
        address: of this machine, as the first rank reaches it.
        companions: processes beside this one with any of which the servers end.
    """

    first_number: int = 0
    address: str = "127.0.0.1"
    companions: tuple[int, ...] = ()


class ServerFleet:
    """SGLang servers on this machine, ended with this process whatever ends it.

    Args:
        settings: section `sglang`.
        hf_config: the model's config.json.
        run_dir: logs go to `logs/engine_*.log` below it, the config to `logs/engine_model`.
        dtype: the trainer's data type, for `sglang.dtype` auto.
        on_cpu: whether the servers compute on the CPU.
        batch_responses: responses that one server generates at a time.
        longest_sequence: prompt and response together, in tokens.
        place: among the machines of the launch.
    """

    def __init__(
        self,
        settings: SglangSettings,
        hf_config: Mapping[str, Any],
        run_dir: Path,
        *,
        dtype: str,
        on_cpu: bool,
        batch_responses: int,
        longest_sequence: int,
        place: FleetPlace | None = None,
    ) -> None:
        self._settings, self._place = settings, place or FleetPlace()
        self._host = self._place.address if settings.host == "auto" else settings.host
        self._logs = run_dir / "logs"
        self._on_cpu = on_cpu
        self._model_dir = self._logs / "engine_model"
        self._model_dir.mkdir(parents=True, exist_ok=True)
        if not self._place.first_number:  # the directory is shared, and the first machine's fleet is made first
            replace_file(self._model_dir / "config.json", json.dumps(hf_config, indent=1) + "\n")
        self._shape: dict[str, Any] = {
            "dtype": dtype,
            "on_cpu": on_cpu,
            "batch_responses": batch_responses,
            "longest_sequence": longest_sequence,
            "host": self._host,
        }
        self._processes: dict[int, ServerProcess] = {}
        self._ports: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._closed = False
        _fleets.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, index: int) -> None:
        """Start server number `index`, or start it anew on a port of its own; it is not ready yet.

        Raises:
            ConfigError: no SGLang environment, too few GPUs, or a fixed port that is taken.
            RolloutError: the fleet has been closed.
        """
        self.stop(index)
        if self._closed:
            raise RolloutError(f"{self._name(index)} is not started: the run is ending")
        port = self._choose_port(index)
        name = f"klear-{uuid.uuid4().hex}"
        command = server_command(self._settings, self._model_dir.absolute(), port=port, name=name, **self._shape)
        environment = server_environment(self._settings, index, on_cpu=self._on_cpu)
        self._ports[index], self._names[index] = port, name
        log_file = self._logs / f"engine_{self._place.first_number + index}.log"
        self._processes[index] = ServerProcess(command, environment, log_file, companions=self._place.companions)

    def start_all(self, waiting: Callable[[], None] | None = None) -> list[str]:
        """Start all servers at once and wait until each answers; see `start_most`.

        Returns:
            their URLs, in order.
        """
        return [url for url, _ in self.start_most(0, waiting)]

    def start_most(self, most_failures: int, waiting: Callable[[], None] | None = None) -> list[tuple[str, str]]:
        """Start all servers at once and wait until each answers, or has failed.

        Args:
            most_failures: servers that may fail.
            waiting: called while waiting, several times a second.

        Returns:
            URL of each, in order, and what is wrong with it, which is nothing where it answers.

        Raises:
            ConfigError: see `start`.
            RolloutError: more servers ended or are not ready in time; carries the ends of their logs.
        """
        found: list[tuple[str, str]] = []
        try:
            deadline = time.monotonic() + self._settings.start_seconds  # one for all: they start at the same time
            for index in range(self._settings.servers):
                self.start(index)
            for index in range(self._settings.servers):
                problem = ""
                try:
                    self.wait_ready(index, waiting, deadline=deadline)
                except StartFailed as failure:
                    problem = str(failure)
                    self.stop(index)
                found.append((self.url(index), problem))
                if len(problems := [problem for _, problem in found if problem]) > most_failures:
                    raise RolloutError("\n".join(problems))
        except BaseException:
            self.close()
            raise
        return found

    def url(self, index: int) -> str:
        """Where server number `index` answers."""
        host = self._place.address if self._host in ("0.0.0.0", "::") else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._ports[index]}"

    def pid(self, index: int) -> int:
        """Process id of the server's supervisor."""
        return self._processes[index].pid

    def is_alive(self, index: int) -> bool:
        """Whether the server's process runs; it may not be ready yet."""
        process = self._processes.get(index)
        return process is not None and process.exit_status() is None

    def log_tail(self, index: int) -> str:
        """The end of the server's log."""
        return self._processes[index].log_tail()

    def wait_ready(
        self, index: int, waiting: Callable[[], None] | None = None, *, deadline: float | None = None
    ) -> None:
        """Wait until a started server answers; one whose free port was taken meanwhile is given another.

        Args:
            index: of the server.
            waiting: called while waiting, several times a second.
            deadline: by time.monotonic; None is `sglang.start_seconds` from now.

        Raises:
            StartFailed: it ended, or is not ready after `sglang.start_seconds`; carries the end of its log.
        """
        if deadline is None:
            deadline = time.monotonic() + self._settings.start_seconds
        attempts = 1
        with httpx2.Client(trust_env=False, timeout=5.0) as client:
            while not (is_ready(client, self.url(index)) and self._is_ours(client, index)):
                process = self._processes.get(index)
                if process is None:
                    raise StartFailed(f"{self._name(index)} was ended while it was starting")
                status = process.exit_status()
                if status is not None:
                    taken = _PORT_TAKEN.search(process.log_tail())
                    if taken and self._settings.port is None and attempts < _PORT_ATTEMPTS:
                        attempts += 1
                        self.start(index)
                        continue
                    raise self._ended(index, status, "while starting (sglang.*)")
                if time.monotonic() > deadline:
                    raise StartFailed(
                        f"{self._name(index)} is not ready after {self._settings.start_seconds:.0f} s "
                        f"(sglang.start_seconds); the end of {process.log}:\n{process.log_tail()}"
                    )
                if waiting is not None:
                    waiting()
                time.sleep(_POLL_SECONDS)
        log.info("%s is ready: %s, log %s", self._name(index), self.url(index), self._processes[index].log)

    def require_running(self, seconds: float, waiting: Callable[[], None] | None = None) -> None:
        """Require that every server that was started still runs; asked where one of them gives no answer.

        Args:
            seconds: how long one that gives no answer may take to end, if it is about to.
            waiting: called while waiting, several times a second.

        Raises:
            RolloutError: one has ended; carries the end of its log.
        """
        deadline = time.monotonic() + seconds
        while True:
            for index, process in self._processes.items():
                status = process.exit_status()
                if status is not None:
                    raise self._ended(index, status, "as soon as it was ready")
            if time.monotonic() > deadline:
                return
            if waiting is not None:
                waiting()
            time.sleep(_POLL_SECONDS)

    def stop(self, index: int) -> None:
        """End server number `index` and all its processes; nothing happens when it does not run."""
        process = self._processes.pop(index, None)
        if process is not None:
            process.stop()

    def close(self) -> None:
        """End all servers and their processes; a second call does nothing, and no server is started after it."""
        self._closed = True
        for process in self._processes.values():
            process.request_stop()  # all at once, so that their times to end do not add up
        for index in list(self._processes):
            self.stop(index)
        _fleets.discard(self)

    def _is_ours(self, client: httpx2.Client, index: int) -> bool:
        """Whether the server that answers is the one that was started, and not one that took its port meanwhile."""
        try:
            answer = client.get(f"{self.url(index)}/v1/models")
            return bool(answer.json()["data"][0]["id"] == self._names[index])
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return False

    def _ended(self, index: int, status: int, when: str) -> StartFailed:
        process = self._processes[index]
        return StartFailed(
            f"{self._name(index)} ended with status {status} {when}; the end of {process.log}:\n{process.log_tail()}"
        )

    def _name(self, index: int) -> str:
        number, place = self._place.first_number + index, self._place
        return f"SGLang server {number}" + (f" on {place.address}" if place.first_number else "")

    def _choose_port(self, index: int) -> int:
        try:
            if self._settings.port is None:
                return _free_port(self._host)
            port = self._settings.port + index
            if _is_free(self._host, port):
                return port
        except OSError as error:
            text = f"sglang.host: {self._host} is no address that a server can listen on here: {error}"
            raise ConfigError([text]) from error
        number = self._place.first_number + index
        raise ConfigError(
            [f"sglang.port: port {port} on {self._host} is in use, and server {number} needs it; choose another, or "
             "null for free ones"]
        )  # fmt: skip


def wait_until_answering(urls: Sequence[str], seconds: float, waiting: Callable[[], None]) -> None:
    """Give servers that others start so long to load their model; whoever asks them next says what is wrong.

    Args:
        urls: of the servers.
        seconds: for all of them together.
        waiting: called while waiting, several times a second.
    """
    deadline = time.monotonic() + seconds
    with httpx2.Client(trust_env=False, timeout=5.0) as client:
        left = list(urls)
        while time.monotonic() < deadline and (left := [url for url in left if not is_ready(client, url)]):
            waiting()
            time.sleep(_POLL_SECONDS)


def is_ready(client: httpx2.Client, url: str) -> bool:
    """Whether the server has loaded its model: it answers HTTP only then."""
    try:
        return client.get(f"{url.rstrip('/')}/model_info").status_code == 200
    except httpx2.HTTPError:
        return False


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
