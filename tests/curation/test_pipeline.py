"""Planted rows are found and nothing else; a start that was killed, damaged or changed is taken up where it holds."""

from __future__ import annotations

import json
import os
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
from megatron_klear.curation import curate
from megatron_klear.errors import DataError

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


def test_a_kill_at_any_moment_changes_nothing_about_the_result(
    write_config: Callable[..., Path], run_curation: RunCuration, planted: tuple[Path, Planted]
) -> None:
    settings = settings_of(planted[0])
    config = write_config(None, **settings)
    root = config.parent / "run"
    for stage in ("00-read", "01-dedup", "02-decontaminate"):
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_klear.curate", str(config)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not any((root / "stages" / stage / "rows").glob("[!.]*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    done = run_curation(None, **settings)
    interrupted = [file.read_bytes() for file in done.result.files]
    assert not [p for p in root.rglob("*.part") if "read" not in str(p)] or done.ids
    shutil.rmtree(root)
    whole = run_curation(None, **settings)
    assert [file.read_bytes() for file in whole.result.files] == interrupted
    assert whole.dropped == done.dropped


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


def test_no_row_left_and_a_full_disk_are_told(
    run_curation: RunCuration, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no row is left after the stage tests"):
        run_curation([{**row(1), "domain": "code", "reference": [1, 2]}], stages=("tests",))
    from megatron_klear import curate as entry

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_klear.curation.files.sync", full)
    config = write_config([row(1)], stages=("dedup",), run={"dir": str(Path(os.getcwd(), "unused"))})
    monkeypatch.setattr("megatron_klear.curate.main", lambda settings: full(Path()))
    assert entry.run([str(config)]) == 1
    assert curate is not entry


def test_the_page_escapes_what_rows_say(run_curation: RunCuration) -> None:
    evil = "<script>alert(1)</script>"
    done = run_curation([row(1, evil), row(2, evil), row(3, "fine", source=evil)], stages=("dedup",))
    page = done.result.report.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert json.loads((done.root / "audit.json").read_text())["result"] == ["result/000000-000.jsonl"]
