"""A ledger that is damaged, of another age, full or in use says so in one message and loses nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger import Ledger, LedgerReader


def test_a_second_writer_is_told_who_the_first_is(ledger, file):
    other = subprocess.run(
        [sys.executable, "-c", f"from megatron_klear.rollout.ledger import Ledger; Ledger({str(file)!r})"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert other.returncode == 1
    assert f"{file} is in use: process " in other.stderr.splitlines()[-1]
    with pytest.raises(RolloutError, match=r"in use: process \d+ on .* writes to it"):
        Ledger(file)


def test_what_another_machine_writes_is_read_there(ledger, file):
    lock = file.with_name(file.name + ".lock")
    lock.write_text("process 7 on node9\n")
    with pytest.raises(RolloutError, match=r"process 7 on node9 writes to it, and .* run this on node9, or when"):
        LedgerReader(file)
    ledger.close()
    lock.write_text("process 7 on node9\n")
    with LedgerReader(file) as reader:  # it has ended
        assert reader.steps() == []


def test_a_writer_does_not_mind_a_reader_that_asks_for_one(file):
    with file.with_name(file.name + ".lock").open("w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        soon = threading.Timer(0.15, fcntl.flock, [asking, fcntl.LOCK_UN])
        soon.start()
        Ledger(file).close()
        soon.join()


def test_people_read_while_the_run_writes(ledger, file, advance):
    advance(ledger, "a", "graded")
    with LedgerReader(file) as reader, ledger.transaction():
        advance(ledger, "b", "graded")
        assert reader.states() == {"graded": 1}
    with LedgerReader(file) as reader:
        assert reader.states() == {"graded": 2}


READS = """
import os, sys
from pathlib import Path
from megatron_klear.errors import RolloutError
from megatron_klear.rollout.ledger import LedgerReader
if not os.getuid():
    os.setuid(65534)  # root may write anywhere
try:
    with LedgerReader(Path(sys.argv[1])) as reader:
        print(reader.states())
except RolloutError as error:
    print(error)
"""


@pytest.fixture
def shut():
    """A directory that others than its owner may go into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        Path(name).chmod(0o755)


def read_by_another(file: Path) -> str:
    """What somebody reads who may not write to the ledger's directory."""
    file.parent.chmod(0o555)
    before = sorted(file.parent.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", READS, str(file)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(file.parent.iterdir()) == before
    return done.stdout.strip()


def test_a_closed_ledger_is_read_where_nothing_can_be_written(shut, advance):
    file = shut / "ledger of #1?.sqlite"
    with Ledger(file) as ledger:
        advance(ledger, "a", "graded")
    assert read_by_another(file) == "{'graded': 1}"
    shut.chmod(0o755)
    Path(f"{file}-wal").touch()
    assert read_by_another(file) == "{'graded': 1}", "there is nothing in it"
    file.chmod(0o000)
    assert read_by_another(file).endswith("the ledger cannot be used (SQLITE_CANTOPEN: unable to open database file)")


def test_people_of_other_names_read_while_the_run_writes(shut, advance):
    with Ledger(shut / "ledger.sqlite") as ledger:
        advance(ledger, "a", "graded")
        assert read_by_another(shut / "ledger.sqlite") == "{'graded': 1}"


def test_a_ledger_that_was_not_closed_is_not_read_without_its_log(ledger, file, shut, advance):
    advance(ledger, "a", "graded")
    for name in (file.name, f"{file.name}-wal"):
        shutil.copy(file.parent / name, shut)
    copy = shut / file.name
    assert read_by_another(copy) == (
        f"{copy} was not closed, and its directory cannot be written to, as SQLite must to read what is in "
        "ledger.sqlite-wal. Make the directory writable, or copy ledger.sqlite together with ledger.sqlite-wal into "
        "one that is"
    )
    shut.chmod(0o755)
    with LedgerReader(copy) as reader:
        assert reader.states() == {"graded": 1}


def test_another_schema_is_refused(file):
    Ledger(file).close()
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for opening in (Ledger, LedgerReader):
        with pytest.raises(
            RolloutError, match="schema 99, and this version of megatron_klear reads and writes schema 1"
        ):
            opening(file)


def test_another_database_is_refused(file):
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    for opening in (Ledger, LedgerReader):
        with pytest.raises(RolloutError, match="no rollout ledger"):
            opening(file)


def test_missing_ledger_is_said_to_be_missing(file):
    with pytest.raises(RolloutError, match="no ledger"):
        LedgerReader(file)
    with pytest.raises(RolloutError, match="run\\.dir"):
        Ledger(file.parent / "nowhere" / "ledger.sqlite")


@pytest.mark.parametrize("start", [0, 100, 4096])
def test_damage_is_one_clear_message(file, advance, start):
    with Ledger(file) as ledger, ledger.transaction():
        for i in range(200):
            advance(ledger, f"p{i}", "graded")
    content = bytearray(file.read_bytes())
    content[start : start + 8 * 4096] = b"\xa5" * (8 * 4096)
    file.write_bytes(content)
    with pytest.raises(RolloutError, match=r"ledger is damaged|no rollout ledger") as caught:
        Ledger(file)
    assert str(file) in str(caught.value)


def test_a_full_disk_keeps_what_was_committed(ledger, file, advance, make_prompt, make_rollout):
    kept = advance(ledger, "kept", "graded")
    pages = ledger.connection.execute("PRAGMA page_count").fetchone()[0]
    ledger.connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    [group] = ledger.reserve([(0, make_prompt("big"))], num_responses=1)
    with pytest.raises(RolloutError, match=r"cannot grow .*Free disk space and start again"):
        ledger.save_response(group, 0, make_rollout((0, 50_000)))
    assert ledger.states() == {"graded": 1, "reserved": 1}
    assert ledger.load([kept])[0].is_complete
    ledger.connection.execute("PRAGMA max_page_count = 1000000")
    assert ledger.save_response(group, 0, make_rollout((0, 50_000)))


def test_a_locked_ledger_is_reported_in_time(file, monkeypatch):
    from megatron_klear.rollout.ledger import database

    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.2)
    with Ledger(file) as ledger:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RolloutError, match="another process has locked the ledger"):
            ledger.set_fact("a", "b")
        other.execute("ROLLBACK")
        other.close()
        ledger.set_fact("a", "b")
        assert ledger.fact("a") == "b"
