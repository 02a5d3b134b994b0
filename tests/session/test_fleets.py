"""Servers on several machines from the first rank: numbers, addresses, failures and ends; the servers are pages."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.rollout.sglang import FleetPlace, ServerFleet, start_report
from megatron_klear.session.fleets import MachineFleets, require_reachable

SERVER = """#!/bin/sh
# As python in SGLang's environment: answers /model_info and /v1/models on the host and port that it is given.
while [ $# -gt 0 ]; do
    case $1 in --host) host=$2;; --port) port=$2;; --served-model-name) name=$2;; esac; shift
done
[ -e "$BROKEN" ] && [ "$host" = 127.0.0.2 ] && { echo "no kernels on $host"; exit 3; }
[ -e "$SLOW" ] && [ "$host" = 127.0.0.1 ] && exec sleep 600
mkdir -p "$PAGES/$port/v1" && cd "$PAGES/$port" && touch model_info || exit
echo '{"data": [{"id": "'"$name"'"}]}' >v1/models
exec $PAGER_PYTHON -m http.server --bind "$host" "$port"
"""


class Launch:
    """Stands in for `Machines` of two machines: each call goes to a thread, as it does to another process."""

    count = 2
    is_leader = True

    def __init__(self) -> None:
        self.actions: list[dict[str, Callable[..., Any]]] = [{}, {}]
        self.making = 0

    def offer(self, name: str, action: Callable[..., Any]) -> None:
        self.actions[self.making][name] = action

    def call(self, machine: int, name: str, *arguments: Any, waiting: Callable[[], None] = lambda: None) -> Any:
        return self.actions[machine][name](*arguments, waiting)


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[MachineFleets, MachineFleets]]]:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(SERVER)
    python.chmod(0o755)
    for name, value in {
        "PAGES": tmp_path / "pages",
        "PAGER_PYTHON": sys.executable,
        "BROKEN": tmp_path / "broken",
        "SLOW": tmp_path / "slow",
    }.items():
        monkeypatch.setenv(name, str(value))
    made: list[MachineFleets] = []

    def make(second: str = "127.0.0.2") -> tuple[MachineFleets, MachineFleets]:
        launch: Any = Launch()
        for machine in range(2):
            launch.making = machine
            place = FleetPlace(first_number=2 * machine, address=second if machine else "127.0.0.1")

            def fleet(place: FleetPlace = place) -> ServerFleet:
                settings = SglangSettings(venv=str(tmp_path), servers=2, start_seconds=60.0)
                shape: dict[str, Any] = {"dtype": "float32", "on_cpu": True, "batch_responses": 4}
                return ServerFleet(settings, {}, tmp_path / "run", longest_sequence=64, place=place, **shape)

            made.append(MachineFleets(launch, fleet))
        return made[-2], made[-1]

    yield make
    for fleets in made:
        fleets.close()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/model_info", timeout=5) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def test_they_are_numbered_machine_by_machine_and_one_is_replaced_where_it_was(
    start: Callable[[], tuple[MachineFleets, MachineFleets]], tmp_path: Path
) -> None:
    first, second = start()
    waits: list[int] = []
    ready: list[int] = []
    urls = first.start_all(lambda: waits.append(1), on_ready=ready.append)
    assert sum(ready) == 4
    assert [url.rpartition(":")[0] for url in urls] == ["http://127.0.0.1"] * 2 + ["http://127.0.0.2"] * 2
    assert all(answers(url) for url in urls)
    assert waits, "the other ranks must be told while servers load"
    logs = tmp_path / "run" / "logs"
    assert sorted(path.name for path in logs.glob("*.log")) == [f"engine_{i}.log" for i in range(4)]
    assert first.stop(3) is None
    assert [answers(url) for url in urls] == [True, True, True, False]
    first.start(3)
    first.wait_ready(3, lambda: None)
    assert first.url(3).startswith("http://127.0.0.2:")
    assert first.url(3) != urls[3]
    assert answers(first.url(3))
    assert [first.url(i) for i in range(3)] == urls[:3]
    second.close()  # what the second machine's process does when it ends
    assert [answers(first.url(i)) for i in range(4)] == [True, True, False, False]
    with pytest.raises(RolloutError, match="the run is ending"):
        first.start(2)


def test_servers_of_a_machine_that_has_an_ipv6_address_only(start: Callable[..., Any]) -> None:
    first, _ = start("::1")
    urls = first.start_all(lambda: None)
    assert [url.rpartition(":")[0] for url in urls] == ["http://127.0.0.1"] * 2 + ["http://[::1]"] * 2
    assert all(answers(url) for url in urls)
    assert first.url(2) != first.url(3)


def test_a_machine_that_cannot_start_its_servers_ends_the_start_elsewhere_and_says_why(
    start: Callable[[], tuple[MachineFleets, MachineFleets]], tmp_path: Path
) -> None:
    (tmp_path / "broken").touch()
    first, _ = start()
    told = r"(?s)server [23] on 127.0.0.2 ended with status 3.*no kernels on 127.0.0.2"  # whichever is seen first
    with pytest.raises(RolloutError, match=told):
        first.start_all(lambda: None)
    assert first._fleet is not None
    assert not any(first._fleet.is_alive(index) for index in range(2))


def test_a_run_that_may_begin_with_fewer_is_told_which_servers_failed(
    start: Callable[[], tuple[MachineFleets, MachineFleets]], tmp_path: Path
) -> None:
    (tmp_path / "broken").touch()
    first, _ = start()
    urls = first.start_all(lambda: None, 2)
    assert [answers(url) for url in urls] == [True, True, False, False]
    assert set(first.failed) == {2, 3}
    assert all("no kernels on 127.0.0.2" in problem for problem in first.failed.values())
    (tmp_path / "broken").unlink()  # whoever restarts them finds them where they were
    first.start(3)
    first.wait_ready(3, lambda: None)
    assert answers(first.url(3))
    (tmp_path / "broken").touch()
    again, _ = start()
    with pytest.raises(
        RolloutError,
        match=r"(?s)2 of 4 servers did not start, and scheduling.min_engines is 3:\nSGLang server 2 on.*\n"
        r"SGLang server 3 on.*no kernels",
    ):
        again.start_all(lambda: None, 3)
    assert again._fleet is not None
    assert not any(again._fleet.is_alive(index) for index in range(2))


def test_failures_on_all_machines_are_counted_while_servers_start(
    start: Callable[[], tuple[MachineFleets, MachineFleets]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(start_report, "_EVERY_SECONDS", 0.5)
    for name in ("broken", "slow"):
        (tmp_path / name).touch()
    first, _ = start()
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"2 of 4 servers did not start, and scheduling.min_engines is 3:"):
        first.start_all(lambda: None, 3)
    assert time.monotonic() - began < 40.0, "the servers of the first machine have a minute"
    again, _ = start()
    deadline = time.monotonic() + 40.0

    def waiting() -> None:
        told = sum("no kernels" in message for message in caplog.messages)
        if (told == 2 and "2 failed" in caplog.text) or time.monotonic() > deadline:
            raise RolloutError(f"{told} told")

    with pytest.raises(RolloutError, match="2 told"):
        again.start_all(waiting, 2)
    assert re.search(r"0 of 4 servers are ready after 0:\d\d of 1:00 \(sglang.start_seconds\); 2 failed", caplog.text)


def test_what_a_server_died_of_is_told_by_its_machine(
    start: Callable[[], tuple[MachineFleets, MachineFleets]], tmp_path: Path
) -> None:
    first, second = start()
    first.start_all(lambda: None)
    assert second._fleet is not None
    [page] = psutil.Process(second._fleet.pid(1)).children()
    page.kill()
    told = first.stop(3)
    assert told is not None
    assert told.startswith(f"ended with status 137; the end of {tmp_path}/run/logs/engine_3.log:\n")


def test_a_server_that_ends_when_it_was_ready_is_named_with_its_log(
    start: Callable[[], tuple[MachineFleets, MachineFleets]], tmp_path: Path
) -> None:
    first, second = start()
    first.start_all(lambda: None)
    waits: list[int] = []
    first.require_running(0.5, lambda: waits.append(1))
    assert waits, "the other ranks must be told meanwhile"
    assert second._fleet is not None
    [page] = psutil.Process(second._fleet.pid(1)).children()
    killing = threading.Timer(0.5, page.kill)
    killing.start()
    with pytest.raises(RolloutError, match=r"(?s)server 3 on 127.0.0.2 ended with status 137 as soon as it was ready"):
        first.require_running(30.0, lambda: None)


def test_a_start_is_given_up_while_it_waits(start: Callable[[], tuple[MachineFleets, MachineFleets]]) -> None:
    first, _ = start()
    began, main = time.monotonic(), threading.current_thread()

    def waiting() -> None:
        assert threading.current_thread() is main, "it tells other ranks, and that is the main thread's"
        raise RolloutError("asked to stop")

    with pytest.raises(RolloutError, match="asked to stop"):
        first.start_all(waiting)
    assert time.monotonic() - began < 30.0


def test_an_address_that_every_machine_has_for_itself_is_refused_on_several() -> None:
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        require_reachable(host, ["a"])
        require_reachable(host, ["a", "a"])  # two launches on one machine
        with pytest.raises(
            ConfigError, match=f"sglang.host: got {host}, where servers on b, c would hear only their own"
        ):
            require_reachable(host, ["a", "b", "c"])
    for host in ("auto", "0.0.0.0", "10.0.0.1"):
        require_reachable(host, ["a", "b"])
