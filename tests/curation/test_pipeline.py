"""Planted rows are found and nothing else; a start that was killed, damaged or changed is taken up where it holds."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curation_inputs import BENCHMARKS, Planted, row, write_inputs
from megatron_klear.curation import engines
from megatron_klear.curation.audit import KEYS_PER_TABLE, OTHERS, Audit, merged
from megatron_klear.errors import DataError, KlearError

DOCUMENTS = 2000
RunCuration = Callable[..., Any]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    directory = tmp_path_factory.mktemp("planted")
    return directory, write_inputs(directory, DOCUMENTS, words=60, seed=5)


def settings_of(directory: Path) -> dict[str, object]:
    return {
        "stages": ("dedup", "decontaminate"),
        "run": {"rows_per_file": 150},
        "input": {"files": [str(directory / "input-*.jsonl")]},
        "decontamination": {"benchmarks": [str(directory / f"{name}.jsonl") for name in BENCHMARKS]},
    }


def test_every_planted_row_is_found_and_nothing_else(run_curation: RunCuration, planted: tuple[Path, Planted]) -> None:
    directory, expected = planted
    done = run_curation(None, **settings_of(directory))
    assert len(expected.duplicates) > 60
    assert len(expected.contaminated) > 60
    assert len(expected.innocent) > 60
    assert {r["id"] for r in done.dropped if r["reason"] == "duplicate"} == expected.duplicates
    contaminated = {r["id"]: (r["benchmark"], r["problem"]) for r in done.dropped if r["reason"] == "contaminated"}
    assert contaminated == expected.contaminated
    assert len(done.ids) == DOCUMENTS - len(expected.duplicates) - len(expected.contaminated)
    assert expected.innocent <= set(done.ids)
    # In the order of the input, nothing twice, all counts consistent.
    numbers = [int(name.removeprefix("doc-")) for name in done.ids]
    assert numbers == sorted(set(numbers))
    assert done.audit("dedup")["rows_in"] == DOCUMENTS
    assert done.audit("dedup")["dropped"] == {"duplicate": len(expected.duplicates)}
    assert done.audit("export")["rows_out"] == len(done.ids)
    # Two processes make the same files.
    before = [file.read_bytes() for file in done.result.files]
    shutil.rmtree(done.root)
    again = run_curation(None, **{**settings_of(directory), "run": {"rows_per_file": 150, "workers": 2}})
    assert [file.read_bytes() for file in again.result.files] == before


def made(done: Any) -> dict[str, int]:
    """Units that the last start made, by stage."""
    return {stage.name: stage.units - stage.kept_units for stage in done.result.stages}


def test_a_second_start_keeps_what_is_whole_and_redoes_the_rest(
    run_curation: RunCuration, planted: tuple[Path, Planted]
) -> None:
    settings = settings_of(planted[0])
    first = run_curation(None, **settings)
    result, rows = [file.read_bytes() for file in first.result.files], len(first.ids)
    assert made(first)["dedup"] > 8
    assert set(made(run_curation(None, **settings)).values()) == {0}

    # A damaged file and a lost one: those units are made again, and no other.
    stage = first.root / "stages" / "01-dedup"
    victims = sorted((stage / "rows").iterdir())
    victims[2].write_bytes(victims[2].read_bytes()[:-20])
    victims[5].unlink()
    (first.root / "stages" / "02-decontaminate" / "units" / "000004.json").write_text("{")
    mended = run_curation(None, **settings)
    assert made(mended) == {"read": 0, "dedup": 2, "decontaminate": 1, "export": first.result.stages[-1].units}
    assert [file.read_bytes() for file in mended.result.files] == result

    # What the units were judged by is lost: all of the stage is judged again.
    (stage / "prompts.sqlite").write_bytes(b"no database")
    assert made(run_curation(None, **settings))["dedup"] == first.result.stages[1].units

    # Another rule redoes its stage and those after it.
    changed = run_curation(
        None,
        **{**settings, "decontamination": {**settings["decontamination"], "ngram": 40}},  # type: ignore[dict-item]
    )
    assert (made(changed)["read"], made(changed)["dedup"]) == (0, 0)
    assert made(changed)["decontaminate"] == first.result.stages[2].units
    assert len(changed.ids) > rows


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_moments_of_all_stages_change_nothing_about_the_result(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted], seed: int
) -> None:
    rng = random.Random(seed)
    settings = settings_of(planted[0])
    config = write_config(None, **settings)
    root = config.parent / "run"
    waiting, landed = ["00-read", "01-dedup", "02-decontaminate", "03-export"], []
    for _ in range(16):
        if not waiting:
            break
        units = root / "stages" / waiting[0] / "units"
        process = started(config)
        # After some of the units that are still to be made, and anywhere within the next one.
        wanted = len(list(units.glob("*.json"))) + rng.randrange(3)
        deadline = time.monotonic() + 120
        while process.poll() is None and (not units.is_dir() or len(list(units.glob("*.json"))) < wanted):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL and not (root / "audit.json").is_file():
            landed.append(waiting.pop(0))
        else:  # it was faster: once more from the start, as far as the kills before had let it come
            assert process.returncode in (0, -signal.SIGKILL)
            shutil.rmtree(root / "stages" / waiting[0])
            (root / "audit.json").unlink(missing_ok=True)
    assert (waiting, len(landed)) == ([], 4)
    done = run_curation(None, **settings)
    interrupted = {file.name: file.read_bytes() for file in (root / "result").iterdir()}
    rejects, dropped = done.rejects, done.dropped
    assert list(root.rglob("*.part")) == []
    shutil.rmtree(root)
    whole = run_curation(None, **settings)
    assert {file.name: file.read_bytes() for file in (root / "result").iterdir()} == interrupted
    assert sorted(file.name for file in whole.result.files) == sorted(interrupted)
    assert (whole.rejects, whole.dropped) == (rejects, dropped)


def started(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_klear.curate", str(config), *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_of_two_starts_in_one_directory_the_second_is_refused_and_the_first_goes_on(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted]
) -> None:
    settings = settings_of(planted[0])
    config = write_config(None, **settings)
    root = config.parent / "run"
    first = started(config)
    wait_for((root / "stages" / "00-read" / "rows").is_dir, first)
    first.send_signal(signal.SIGSTOP)  # so that the first is in the middle of its work for as long as this takes
    second = started(config)
    told = second.communicate()[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2, told
    assert f"run.dir: {root} is in use by process {first.pid} on " in told
    first.communicate()
    assert first.returncode == 0
    left = {file.name: file.read_bytes() for file in (root / "result").iterdir()}
    shutil.rmtree(root)
    assert {file.name: file.read_bytes() for file in run_curation(None, **settings).result.files} == left


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes that work on units for it: those of its children that it spawned with a pipe."""
    tasks = Path(f"/proc/{process.pid}/task")
    children = [int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()]
    return [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_no_worker_of_a_killed_run_goes_on_writing(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted]
) -> None:
    settings = {**settings_of(planted[0]), "run": {"rows_per_file": 150, "workers": 2}}
    config = write_config(None, **settings)
    root = config.parent / "run"
    process = started(config)
    wait_for(lambda: any((root / "stages" / "02-decontaminate" / "units").glob("*.json")), process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    resumed = run_curation(None, **settings)
    assert 0 < resumed.result.stages[2].kept_units < resumed.result.stages[2].units
    left = [file.read_bytes() for file in resumed.result.files]
    shutil.rmtree(root)
    assert [file.read_bytes() for file in run_curation(None, **settings).result.files] == left


def test_ctrl_c_reaches_workers_too_and_leaves_a_run_that_can_be_resumed(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted]
) -> None:
    settings = {**settings_of(planted[0]), "run": {"rows_per_file": 150, "workers": 2}}
    config = write_config(None, **settings)
    command = [sys.executable, "-m", "megatron_klear.curate", str(config)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        # A shell starts what runs in its background with Ctrl-C ignored, these tests perhaps.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    units = config.parent / "run" / "stages" / "02-decontaminate" / "units"
    wait_for(lambda: any(units.glob("*.json")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    told = process.communicate()[1]
    assert process.returncode == 75, told
    assert told.endswith("stopped; start again on the same run.dir to go on\n")
    assert "Traceback" not in told
    assert run_curation(None, **settings).result.stages[2].kept_units > 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_sigterm_leaves_a_run_that_can_be_resumed(
    write_config: Callable[..., Path], planted: tuple[Path, Planted]
) -> None:
    config = write_config(None, **settings_of(planted[0]))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_klear.curate", str(config)], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (config.parent / "run" / "stages" / "00-read" / "rows").is_dir():
        time.sleep(0.005)
    process.terminate()
    stderr = process.communicate()[1]
    assert process.returncode == 75, stderr
    assert "start again on the same run.dir" in stderr


def test_no_row_left_is_told(run_curation: RunCuration) -> None:
    with pytest.raises(DataError, match="no row is left after the stage tests"):
        run_curation([{**row(1), "domain": "code", "reference": [1, 2]}], stages=("tests",))


@pytest.mark.parametrize("stage", ["00-read", "02-decontaminate"])
def test_a_full_disk_is_told_and_what_is_finished_stays(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str,
) -> None:  # fmt: skip
    from megatron_klear import curate as entry

    settings = settings_of(planted[0])
    config = write_config(None, **settings)
    root = config.parent / "run"
    left = 10

    def fill(path: Path) -> None:
        nonlocal left
        left -= stage in str(path)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("megatron_klear.curation.files.sync", fill)
        full.setattr("megatron_klear.curation.stage.sync", fill)
        assert entry.run([str(config)]) == 1
    assert f"run.dir = {root}: no space is left" in capsys.readouterr().err
    assert not (root / "result").exists() or not list((root / "result").iterdir())
    done = run_curation(None, **settings)
    resumed = [file.read_bytes() for file in done.result.files]
    if stage != "00-read":
        assert (made(done)["read"], made(done)["dedup"]) == (0, 0)
        assert 0 < made(done)["decontaminate"] < done.result.stages[2].units
    shutil.rmtree(root)
    assert [file.read_bytes() for file in run_curation(None, **settings).result.files] == resumed


def test_the_page_escapes_what_rows_say(run_curation: RunCuration) -> None:
    evil = "<script>alert(1)</script>"
    done = run_curation([row(1, evil), row(2, evil), row(3, "fine", source=evil)], stages=("dedup",))
    page = done.result.report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert json.loads((done.root / "audit.json").read_text())["result"] == ["result/000000-000.jsonl"]


HOSTILE = [
    "$\\bad{$", "</script></pre></details><h1>out</h1>", "\u202eturned round", "\u0645\u0631\u062d\u0628\u0627 123",
    "line\nline\u2028line\x0b\x1b[31m", "{{ 7 * 7 }}{% raw %}", "\u6c49\u5b57" * 200, "e" + "\u0301" * 2000,
    "&lt;b&gt;",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_the_audit_stands_whatever_sources_ids_and_benchmarks_are_called(
    run_curation: RunCuration, tmp_path: Path
) -> None:
    nine = "one two three four five six seven eight nine"
    rows = [row(i, f"{text} {i}", source=text) for i, text in enumerate(HOSTILE)]
    rows += [row(100 + i, f"{text} {i}", source=text) for i, text in enumerate(HOSTILE)]
    rows.append({**row(200, nine), "id": "y" * 1_000_000, "source": "s" * 1_000_000})
    rows.append(row(201, "big " * 1_900_000))
    benchmark = tmp_path / "$b<i>nch$.jsonl"
    benchmark.write_text(json.dumps({"id": "<b>\u202e</b>", "problem": nine}) + "\n")
    done = run_curation(
        rows, stages=("dedup", "decontaminate"), decontamination={"benchmarks": [str(benchmark)]},
    )  # fmt: skip
    assert done.reasons("dedup") == {"duplicate": len(HOSTILE)}
    assert [r["id"] for r in done.dropped if r["reason"] == "contaminated"] == ["y" * 1_000_000]  # whole in the log
    page = done.result.report.read_bytes()
    assert len(page) < 300_000
    text = page.decode()  # UTF-8 throughout
    assert not {char for char in text if ord(char) < 32} - {"\n"}
    assert "\u202e" not in text
    for escaped in ("$\\bad{$", "&lt;/script&gt;", "{{ 7 * 7 }}{% raw %}", "&amp;lt;b&amp;gt;", "$b&lt;i&gt;nch$"):
        assert escaped in text
    assert "<h1>out" not in text
    assert (done.root / "audit.json").stat().st_size < 100_000


def test_a_table_does_not_grow_with_the_number_of_its_keys() -> None:
    parts = [Audit(), Audit()]
    for number in range(3 * KEYS_PER_TABLE):
        parts[number % 2].count("rows by source", f"https://example.org/{number // 2}")
    total = merged(part.to_object() for part in parts)
    counts = total.tables["rows by source"]
    assert sum(counts.values()) == 3 * KEYS_PER_TABLE
    assert len(counts) == KEYS_PER_TABLE + 1
    assert counts["https://example.org/7"] == 2
    assert counts[OTHERS] == 3 * KEYS_PER_TABLE - 2 * KEYS_PER_TABLE


class Deadly:
    """Ends the process that it arrives in."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_killed_worker_is_told_in_words() -> None:
    with pytest.raises(KlearError, match=r"a worker process was killed.*lower run\.workers"):
        list(engines._in_processes([Deadly()], 1))  # type: ignore[list-item]
