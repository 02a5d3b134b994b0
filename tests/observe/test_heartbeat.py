"""Ranks are named with what they were last seen doing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_klear.observe import Heartbeat, note_failure, whereabouts
from megatron_klear.observe.__main__ import main


def test_longest_silent_rank_comes_first_and_missing_ones_before_it(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0, 165.0])
    monkeypatch.setattr("megatron_klear.observe.heartbeat.time.time", lambda: next(clock))
    Heartbeat(tmp_path, 2).beat(7, "train")
    Heartbeat(tmp_path, 0).beat(8, "generate")
    assert whereabouts(tmp_path, 3) == [
        "rank 1: never reported",
        "rank 2: in step 7, train, no news for 65 s",
        "rank 0: in step 8, generate, no news for 5 s",
    ]


def test_stopped_while_writing_keeps_the_note_before(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    heart.beat(4, "train")
    (tmp_path / "logs" / "rank_00000.new").write_text('{"step": 5, "pha')
    assert whereabouts(tmp_path, 1)[0].startswith("rank 0: in step 4, train, no news for")


def test_rank_that_gave_up_waiting_comes_after_the_one_it_waited_for(tmp_path):
    """Both were last seen at the same place; only the one that still hangs is to be looked at."""
    for rank in (0, 1):
        Heartbeat(tmp_path, rank).beat(2, "finish")
    note_failure(tmp_path, 0)
    lines = whereabouts(tmp_path, 2)
    assert lines[0].startswith("rank 1: in step 2, finish, no news for")
    assert lines[1].startswith("rank 0: in step 2, finish, failed 0 s ago")


def test_failure_of_a_rank_that_never_reported_changes_nothing(tmp_path):
    note_failure(tmp_path, 0)
    assert whereabouts(tmp_path, 1) == ["rank 0: never reported"]


def test_unreadable_note_counts_as_never_reported(tmp_path):
    Heartbeat(tmp_path, 0).beat(1, "train")
    (tmp_path / "logs" / "rank_00000.json").write_text('{"step": 1')
    assert whereabouts(tmp_path, 1) == ["rank 0: never reported"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell which processes live")
def test_rank_whose_process_has_ended_comes_first_and_is_said_to_be_gone(tmp_path):
    code = (
        "import sys; from megatron_klear.observe import Heartbeat; Heartbeat(sys.argv[1], 1).beat(5, 'save'); input()"
    )
    Heartbeat(tmp_path, 0).beat(5, "generate")  # silent for longer than the other
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while whereabouts(tmp_path, 2)[0] == "rank 1: never reported":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not any("ended" in line for line in whereabouts(tmp_path, 2))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not collected yet
        uncollected = whereabouts(tmp_path, 2)
        process.wait()
    for lines in (uncollected, whereabouts(tmp_path, 2)):
        assert lines[0].startswith("rank 1: in step 5, save, no news for ")
        assert lines[0].endswith("; its process has ended")
        assert lines[1].startswith("rank 0: in step 5, generate")


def test_the_command_says_where_all_ranks_are(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert main([str(tmp_path), "--where"]) == 2
    assert "no rank of" in capsys.readouterr().err
    for rank, phase in ((0, "generate"), (2, "train")):
        Heartbeat(tmp_path, rank).beat(5, phase)
    assert main([str(tmp_path), "--where"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rank 1: never reported"
    assert {line.split(", no news")[0] for line in lines[1:3]} == {
        "rank 0: in step 5, generate", "rank 2: in step 5, train"
    }  # fmt: skip
    assert lines[3].endswith("logs/engine_*.log")
    assert not (tmp_path / "report.html").exists()
