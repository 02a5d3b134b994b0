"""The servers that a run starts: as many as the settings say, each with a port, a log and a place in the fleet."""

from __future__ import annotations

import atexit
import json
import logging
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.observe.replace import replace_file
from megatron_klear.rollout.sglang.answering import POLL_SECONDS, asking, is_ready
from megatron_klear.rollout.sglang.command import server_command, server_environment
from megatron_klear.rollout.sglang.model_folder import link_weights
from megatron_klear.rollout.sglang.place import FleetPlace
from megatron_klear.rollout.sglang.ports import free_port, is_free
from megatron_klear.rollout.sglang.process import ServerProcess
from megatron_klear.rollout.sglang.start_report import StartTally, say_started

log = logging.getLogger(__name__)

_PORT_ATTEMPTS = 3
_END_SECONDS = 0.5
"""A process that ends breaks off its connections a moment before it has ended."""
_PORT_TAKEN = re.compile(r"address already in use|port .*(in use|not available)", re.IGNORECASE)

_fleets: weakref.WeakSet[ServerFleet] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for fleet in list(_fleets):
        fleet.close()


class StartFailed(RolloutError):
    """A server ended, or did not answer in time."""


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
        weights: directory with safetensors of the model; needed by servers that quantise, and used by no others.
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
        weights: Path | None = None,
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
            if settings.quantization != "none" and weights is not None:
                link_weights(weights, self._model_dir)
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
        self._tally = StartTally()
        self._closed = False
        _fleets.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """How many servers it has."""
        return self._settings.servers

    @property
    def start_seconds(self) -> float:
        """How long each may take to start."""
        return self._settings.start_seconds

    def started(self) -> tuple[int, list[str]]:
        """How many of those that `start_most` starts are ready, and what is wrong with those that failed."""
        return self._tally.ready, list(self._tally.problems.values())

    def start(self, index: int) -> None:
        """Start server number `index`, or start it anew on a port of its own; it is not ready yet.

        Raises:
            ConfigError: no SGLang environment, too few GPUs, or a fixed port that is taken.
            RolloutError: the fleet has been closed.
        """
        self._end([index])
        if self._closed:
            raise RolloutError(f"{self._place.name(index)} is not started: the run is ending")
        port = self._choose_port(index)
        name = f"klear-{uuid.uuid4().hex}"
        command = server_command(self._settings, self._model_dir.absolute(), port=port, name=name, **self._shape)
        environment = server_environment(self._settings, index, on_cpu=self._on_cpu)
        self._ports[index], self._names[index] = port, name
        log_file, companions = self._log_file(index), self._place.companions
        self._processes[index] = ServerProcess(command, environment, log_file, companions=companions)

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
        tally = self._tally = StartTally()
        servers = range(self.size)
        try:
            for index in servers:
                self.start(index)
            say_started(
                [self._ports[index] for index in servers], [self._log_file(index) for index in servers], self._settings
            )
            self._wait(servers, tally, most_failures, waiting)
        except BaseException:
            self.close()
            raise
        return [(self.url(index), tally.problems.get(index, "")) for index in servers]

    def url(self, index: int) -> str:
        """Where server number `index` answers."""
        return self._place.url(self._host, self._ports[index])

    def pid(self, index: int) -> int:
        """Process id of the server's supervisor."""
        return self._processes[index].pid

    def is_alive(self, index: int) -> bool:
        """Whether the server's process runs; it may not be ready yet."""
        process = self._processes.get(index)
        return process is not None and process.exit_status() is None

    def wait_ready(self, index: int, waiting: Callable[[], None] | None = None) -> None:
        """Wait until a started server answers; one whose free port was taken meanwhile is given another.

        Args:
            index: of the server.
            waiting: called while waiting, several times a second.

        Raises:
            StartFailed: it ended, or is not ready after `sglang.start_seconds`, and is ended then; carries the end of
                its log.
        """
        self._wait([index], StartTally(), 0, waiting)

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
                if process.exit_status() is not None:
                    raise RolloutError(self._ended(index, process, "as soon as it was ready"))
            if time.monotonic() > deadline:
                return
            if waiting is not None:
                waiting()
            time.sleep(POLL_SECONDS)

    def stop(self, index: int) -> str | None:
        """End server number `index` and all its processes; nothing happens when it does not run.

        Returns:
            Of one that had ended by itself, "ended with status N; the end of LOG: ..."; otherwise None.
        """
        process = self._processes.pop(index, None)
        if process is None:
            return None
        had_ended = process.has_ended_itself(_END_SECONDS)
        process.stop()
        return f"ended with status {process.exit_status()}; {_log_end(process)}" if had_ended else None

    def close(self) -> None:
        """End all servers and their processes; a second call does nothing, and no server is started after it."""
        self._closed = True
        self._end(list(self._processes))
        _fleets.discard(self)

    def _wait(
        self, servers: Sequence[int], tally: StartTally, most_failures: int, waiting: Callable[[], None] | None
    ) -> None:
        """Wait until each of them answers or has failed, and end those that fail.

        Each time all are looked at: what ends at once is told at once, however long others compile.

        Raises:
            StartFailed: more than `most_failures` have; says of each why.
        """
        deadline = time.monotonic() + self._settings.start_seconds  # one for all: they start at the same time
        left, attempts = list(servers), dict.fromkeys(servers, 1)
        with asking(len(left)) as those:
            while True:
                failed = self._failed(left, attempts)
                ready = those(self._answers, [index for index in left if index not in failed])
                if time.monotonic() > deadline:
                    late = [index for index in left if index not in failed and index not in ready]
                    failed |= {index: self._late(index) for index in late}
                for index in ready:
                    log.info("%s is ready: %s, log %s", self._place.name(index), self.url(index), self._log_file(index))
                self._end(failed)
                tally.ready += len(ready)
                tally.problems |= failed
                if len(tally.problems) > most_failures:
                    raise StartFailed("\n".join(tally.problems.values()))
                left = [index for index in left if index not in failed and index not in ready]
                if not left:
                    return
                if waiting is not None:
                    waiting()
                time.sleep(POLL_SECONDS)

    def _failed(self, servers: Sequence[int], attempts: dict[int, int]) -> dict[int, str]:
        """What is wrong with those that have ended; one whose free port was taken is given another instead."""
        failed: dict[int, str] = {}
        for index in servers:
            process = self._processes.get(index)
            status = None if process is None else process.exit_status()
            if process is None:
                failed[index] = f"{self._place.name(index)} was ended while it was starting"
            elif status is not None:
                taken = _PORT_TAKEN.search(process.log_tail())
                if taken and self._settings.port is None and attempts[index] < _PORT_ATTEMPTS:
                    attempts[index] += 1
                    self.start(index)
                else:
                    failed[index] = self._ended(index, process, "while starting (sglang.*)")
        return failed

    def _answers(self, client: httpx2.Client, index: int) -> bool:
        return is_ready(client, self.url(index)) and self._is_ours(client, index)

    def _is_ours(self, client: httpx2.Client, index: int) -> bool:
        """Whether the server that answers is the one that was started, and not one that took its port meanwhile."""
        try:
            answer = client.get(f"{self.url(index)}/v1/models")
            return bool(answer.json()["data"][0]["id"] == self._names[index])
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError):
            return False

    def _late(self, index: int) -> str:
        process = self._processes.get(index)
        told = "" if process is None else f"; {_log_end(process)}"
        limit = f"{self._settings.start_seconds:.0f} s (sglang.start_seconds)"
        return f"{self._place.name(index)} is not ready after {limit}{told}"

    def _ended(self, index: int, process: ServerProcess, when: str) -> str:
        return f"{self._place.name(index)} ended with status {process.exit_status()} {when}; {_log_end(process)}"

    def _end(self, servers: Iterable[int]) -> None:
        """End those that run, all at once, so that their times to end do not add up."""
        processes = [process for index in servers if (process := self._processes.pop(index, None)) is not None]
        for process in processes:
            process.request_stop()
        for process in processes:
            process.stop()

    def _log_file(self, index: int) -> Path:
        return self._logs / self._place.log_name(index)

    def _choose_port(self, index: int) -> int:
        try:
            if self._settings.port is None:
                return free_port(self._host)
            port = self._settings.port + index
            if is_free(self._host, port):
                return port
        except OSError as error:
            text = f"sglang.host: {self._host} is no address that a server can listen on here: {error}"
            raise ConfigError([text]) from error
        number = self._place.first_number + index
        raise ConfigError(
            [f"sglang.port: port {port} on {self._host} is in use, and server {number} needs it; choose another, or "
             "null for free ones"]
        )  # fmt: skip


def _log_end(process: ServerProcess) -> str:
    return f"the end of {process.log}:\n{process.log_tail()}"
