"""Servers end with the trainer, whatever ends it, and take all of their processes along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.rollout.sglang import process
from megatron_klear.rollout.sglang.process import ServerProcess

ROOT = Path(__file__).parents[3]

TREE = """
import os, signal, subprocess, sys, time
folder, stubborn = sys.argv[1], sys.argv[2] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note(name):
    open(os.path.join(folder, name), "w").write(str(os.getpid()))
note("server")
if os.fork() == 0:
    note("child")
    if os.fork() == 0:
        os.setsid()  # a session of its own, and below an orphan after the next line of its parent
        note("daemon")
        time.sleep(600)
    if os.fork() == 0:
        note("grandchild")
        time.sleep(600)
    os._exit(0)
print("serving", flush=True)
time.sleep(600)
"""
"""A server whose processes are hard to find: one in another session, two whose parent is gone."""

NAMES = ("server", "child", "daemon", "grandchild")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def pids(folder: Path) -> list[int]:
    until(lambda: all((folder / name).exists() and (folder / name).read_text() for name in NAMES))
    return [int((folder / name).read_text()) for name in NAMES]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def start(folder: Path, kind: str = "plain") -> ServerProcess:
    return ServerProcess([sys.executable, "-c", TREE, str(folder), kind], os.environ, folder / "engine.log")


@pytest.mark.parametrize("kind", ["plain", "stubborn"])
def test_stop_ends_every_process(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, kind)
    numbers = pids(tmp_path)
    assert server.exit_status() is None
    server.stop()
    assert all(gone(number) for number in [*numbers, server.pid])
    assert server.log_tail() == "serving"
    server.stop()


def test_a_server_that_ends_by_itself_is_noticed_and_its_orphans_are_ended(tmp_path: Path) -> None:
    server = start(tmp_path)
    numbers = pids(tmp_path)
    os.kill(numbers[0], signal.SIGKILL)
    until(lambda: server.exit_status() is not None)
    assert server.exit_status() == 128 + signal.SIGKILL
    assert all(gone(number) for number in numbers)


def test_the_end_of_a_server_is_its_own_until_it_is_asked_for(tmp_path: Path) -> None:
    """Also where its connections break off a moment before it has ended."""
    for name in ("asked", "killed"):
        (tmp_path / name).mkdir()
    asked, killed = start(tmp_path / "asked"), start(tmp_path / "killed")
    pids(tmp_path / "asked")
    server = pids(tmp_path / "killed")[0]
    assert not asked.has_ended_itself()
    asked.stop()
    assert not asked.has_ended_itself()
    assert not killed.has_ended_itself()
    threading.Timer(0.3, os.kill, (server, signal.SIGKILL)).start()
    assert killed.has_ended_itself(30.0)
    killed.stop()
    assert killed.exit_status() == 128 + signal.SIGKILL


def test_that_a_server_has_ended_is_known_before_its_processes_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their GPUs may take seconds to let them go, and the trainer asks for the server's end meanwhile."""
    slow, line = tmp_path / "supervisor.py", "deadline = time.monotonic() + 30.0"
    text = process._SUPERVISOR.read_text()
    assert text.count(line) == 1
    slow.write_text(text.replace(line, f"time.sleep(6.0); {line}"))
    monkeypatch.setattr(process, "_SUPERVISOR", slow)
    server = ServerProcess(["/bin/sh", "-c", "exit 134"], os.environ, tmp_path / "engine.log")
    assert server.has_ended_itself(5.0)
    assert server.exit_status() is None
    server.stop()
    assert server.exit_status() == 134


def test_a_log_is_added_to_and_the_tail_is_of_the_last_start(tmp_path: Path) -> None:
    for text in ("first", "second"):
        server = ServerProcess([sys.executable, "-c", f"print('{text}')"], os.environ, tmp_path / "engine.log")
        until(lambda: server.exit_status() is not None)  # noqa: B023
        assert server.exit_status() == 0
        assert server.log_tail() == text
    assert "first" in (tmp_path / "engine.log").read_text()


TRAINER = """
import os, sys, time
from pathlib import Path
from megatron_klear.rollout.sglang import process
from megatron_klear.rollout.sglang.process import ServerProcess
folder = Path(sys.argv[1])
process._SUPERVISOR = Path(os.environ.get("SUPERVISOR", process._SUPERVISOR))
server = ServerProcess([sys.executable, "-c", os.environ["TREE"], str(folder), "stubborn"], os.environ, folder / "log")
(folder / "supervisor").write_text(str(server.pid))
if sys.argv[2] == "fork":
    if os.fork() == 0:  # a child that holds what its parent holds, the supervisor's pipe too
        time.sleep(600)
{0}
"""


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path, kind: str) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format("time.sleep(600)"), str(tmp_path), kind],
        env={**os.environ, "TREE": TREE, "PYTHONPATH": str(ROOT)},
    )
    numbers = pids(tmp_path)
    children = [p.pid for p in psutil.Process(trainer.pid).children()]
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    supervisor = int((tmp_path / "supervisor").read_text())
    until(lambda: all(gone(number) for number in [*numbers, supervisor]))
    for number in set(children) - {supervisor}:
        os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize(
    ("there", "absent", "ended"),
    [('/ "children"', '/ "absent"', 4), ("/proc", "/nowhere", 1)],
    ids=["no lists", "none"],
)
def test_a_kernel_that_tells_less_of_processes_changes_nothing_for_the_server(
    tmp_path: Path, there: str, absent: str, ended: int
) -> None:
    """Without lists of children (CONFIG_PROC_CHILDREN) everything ends; without /proc the server itself, at least."""
    text = (ROOT / "megatron_klear" / "rollout" / "sglang" / "supervisor.py").read_text()
    assert there in text
    (tmp_path / "supervisor.py").write_text(text.replace(there, absent))
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format("time.sleep(600)"), str(tmp_path), "plain"],
        env={**os.environ, "TREE": TREE, "PYTHONPATH": str(ROOT), "SUPERVISOR": str(tmp_path / "supervisor.py")},
    )
    numbers = pids(tmp_path)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    supervisor = int((tmp_path / "supervisor").read_text())
    try:
        until(lambda: all(gone(number) for number in [*numbers[:ended], supervisor]))
    finally:
        for number in [supervisor, *numbers]:
            if not gone(number):
                os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("when", ["later", "before"])
def test_it_ends_with_any_other_process_of_the_trainer(tmp_path: Path, when: str) -> None:
    """Not with the one that is a sibling of none of them: only pids that it was given count."""
    companions = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    try:
        if when == "before":
            companions[1].kill()
            companions[1].wait()
        command = [sys.executable, "-c", TREE, str(tmp_path), "stubborn"]
        known = [process.pid for process in companions]
        server = ServerProcess(command, os.environ, tmp_path / "engine.log", companions=[os.getpid(), *known])
        if when == "later":
            numbers = pids(tmp_path)
            time.sleep(0.5)
            assert server.exit_status() is None
            companions[1].kill()
            until(lambda: all(gone(number) for number in [*numbers, server.pid]))
        until(lambda: server.exit_status() is not None)
    finally:
        for process in companions:
            process.kill()
            process.wait()


def test_nothing_is_left_when_the_supervisor_itself_is_killed(tmp_path: Path) -> None:
    server = start(tmp_path)
    numbers = pids(tmp_path)
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: gone(numbers[0]))  # the kernel ends the server; what it orphaned before is out of reach
    for number in numbers[1:]:
        if not gone(number):
            os.kill(number, signal.SIGKILL)
    server.stop()


REAL = """
import json, sys, time
from pathlib import Path
from megatron_klear.config.serving import SglangSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.model import hf_config
from megatron_klear.rollout.sglang import ServerFleet
fleet = ServerFleet(
    SglangSettings(venv=sys.argv[2]), hf_config(architecture(tied=False), dtype="float32"), Path(sys.argv[1]),
    dtype="float32", on_cpu=True, batch_responses=4, longest_sequence=64,
)
fleet.start(0)
Path(sys.argv[1], "supervisor").write_text(str(fleet.pid(0)))
time.sleep(600)
"""


def test_sglangs_own_processes_end_with_a_killed_trainer(tmp_path: Path, sglang_settings: SglangSettings) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", REAL, str(tmp_path), sglang_settings.venv],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    note = tmp_path / "supervisor"
    until(lambda: note.exists() and bool(note.read_text()), 120)
    supervisor = psutil.Process(int(note.read_text()))
    # The scheduler and the detokenizer are processes of their own, made in the middle of starting.
    until(lambda: len(supervisor.children(recursive=True)) >= 3, 180)
    everyone = [supervisor, *supervisor.children(recursive=True)]
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    until(lambda: all(gone(process.pid) for process in everyone))
