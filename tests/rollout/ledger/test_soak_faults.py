"""What the soak does to servers and disks, and what it tells of it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.small_disk import nearly_full
from benchmarks.soak import FAULTS, Soak
from benchmarks.soak_kills import AGAIN, Kills, number_of
from benchmarks.soak_trainer import Trainer


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes a server's log."""
    with (tmp_path / "engine_3.log").open("wb") as log:
        process = subprocess.Popen(["sleep", "600"], stdout=log)
    yield process
    process.kill()
    process.wait()


def test_a_kill_counts_where_it_meets_a_living_process(sleeper: subprocess.Popen[bytes]) -> None:
    kills, server = Kills(lambda: ""), psutil.Process(sleeper.pid)
    assert number_of(server) == 3
    assert kills.kill([server], server=3, life=1, step=2)
    while server.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not kills.kill([server], server=3, life=1, step=2), "it has ended, and nobody has waited for it"
    assert sleeper.wait() == -signal.SIGKILL
    assert not kills.kill([server], server=3, life=1, step=2), "nor is there any more"
    assert len(kills.all) == 1


def test_the_soak_counts_it_as_such(sleeper: subprocess.Popen[bytes]) -> None:
    server = psutil.Process(sleeper.pid)
    trainer = SimpleNamespace(servers=lambda: [server], output=lambda: "", lives=1, step=lambda: 2)
    soak = Soak(trainer, random.Random(0), FAULTS)
    soak._cause("server killed")
    sleeper.wait()
    soak._cause("server killed")
    trainer.servers = list
    soak._cause("server killed")
    assert soak.faults == {
        "server killed": 1, "server had ended before it was killed": 1,
        "not server killed: there was no server yet": 1,
    }  # fmt: skip
    assert soak.kills() == 1


def test_what_became_of_a_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak_kills.killed", lambda process: True)
    now, printed = [0.0], ["engine 0 (http://a:1) serves again, with version 1\n"]
    kills = Kills(lambda: "".join(printed), lambda: now[0])

    def kill(server: int) -> None:
        assert kills.kill([object()], server=server, life=1, step=5)

    kill(0)
    now[0] = 4.0
    kills.look()
    assert kills.all[0].served_again_after is None, "what was said before is no news"
    kill(0)
    kill(1)
    now[0] = 10.0
    printed.append("engine 0 (http://a:2) serves again, with version 5\n")
    kills.look()
    now[0] = 16.5
    kill(10)
    kills.end_life("the trainer was killed")
    told = [(k["server"], k["outcome"], k["served_again_after"]) for k in kills.told()]
    assert told == [
        (0, AGAIN, None),
        (0, "served again", 6.0),
        (1, "the trainer was killed 12 s later, before the server served again", None),
        (10, "the trainer was killed 0 s later, before the server served again", None),
    ]


def test_a_small_disk_runs_out_of_space_and_all_it_held_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "old").write_text("old")
    with nearly_full(run, 300_000) as is_full:
        if is_full:
            (run / "ledger").write_bytes(bytes(2**17))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                (run / "more").write_bytes(bytes(300_000 - 2**16))
            (run / "more").unlink(missing_ok=True)
        else:
            (run / "ledger").write_bytes(bytes(2**17))
    assert (run / "logs" / "old").read_text() == "old"
    assert (run / "ledger").read_bytes() == bytes(2**17)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("can_mount", [True, False])
def test_a_full_disk_says_which_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_mount: bool) -> None:
    if not can_mount:
        monkeypatch.setattr("benchmarks.small_disk._can_mount", lambda parent: False)
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.sqlite").write_bytes(bytes(5000))
    limits = []
    trainer = SimpleNamespace(
        run=run, servers=lambda: [], lives=4, output=lambda: "the ledger cannot grow (disk is full)",
        start=lambda steps, file_limit=None: limits.append(file_limit), wait=lambda seconds: [1, 1],
    )  # fmt: skip
    soak = Soak(trainer, random.Random(0), FAULTS)
    assert soak._fill_disk(70_000) == "disk full"
    [told] = soak.full_disks
    assert (told["life"], told["met"], told["spare_bytes"]) == (4, True, 70_000)
    if limits == [None]:
        assert can_mount
        assert str(told["how"]).startswith("ENOSPC")
    else:
        assert limits == [75_000]
        assert str(told["how"]).startswith("EFBIG: RLIMIT_FSIZE")


def test_a_soak_says_what_it_did_not_meet() -> None:
    soak = Soak(SimpleNamespace(output=lambda: ""), random.Random(0), FAULTS)
    soak.faults.update({"server killed": 3, "trainer killed": 2, "disk full": 1, "network could not be silenced": 1})
    assert soak.unmet(6, FAULTS) == ["5 kills of 6", "no server stopped", "no network silent"]
    assert soak.unmet(5, ()) == []


SERVER = """
import subprocess, sys
worker = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(worker.pid, flush=True)
sys.stdin.read()  # it ends, and its worker does not
"""


def test_what_a_server_leaves_is_counted_by_whatever_name(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [])
    command = [sys.executable, "-c", SERVER, "sglang.launch_server", str(trainer.run / "logs")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as server, subprocess.Popen(["sleep", "600"], start_new_session=True) as other:  # fmt: skip
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        try:
            assert [process.pid for process in trainer.servers()] == [server.pid]
            assert {process.pid for process in trainer.left()} == {server.pid, worker.pid}
            server.communicate()
            assert trainer.servers() == []
            assert trainer.left() == [worker]
        finally:
            worker.kill()
            other.kill()
    while psutil.pid_exists(worker.pid) and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert trainer.left() == []


def test_a_server_that_was_never_asked_for_is_seen_before_its_trainer_is_killed(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [])
    supervisor = [sys.executable, "-c", SERVER, "supervisor.py", "sglang.launch_server", str(trainer.run)]
    with subprocess.Popen(
        supervisor, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as server, subprocess.Popen(["sleep", "600"]) as rank:  # fmt: skip
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        try:
            trainer.ranks = [rank]
            trainer.kill([0])
            assert rank.returncode == -signal.SIGKILL
            assert trainer.servers() == [], "supervisors are none"
            assert {process.pid for process in trainer.left()} == {server.pid, worker.pid}
        finally:
            worker.kill()
            rank.kill()
