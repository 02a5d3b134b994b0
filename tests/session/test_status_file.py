"""The file that carries the exit status of an entry past torchrun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_klear.config import RunSettings, Settings, TokenizerSettings
from megatron_klear.errors import DataError, RolloutError
from megatron_klear.session import launch
from megatron_klear.session.closing import closed_within, told_at_once
from megatron_klear.session.launch import STATUS_FILE, Preempted, run_entry


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """An entry takes over SIGTERM and SIGINT for good; the test session wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def _good_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(dir=str(tmp_path / "run")), tokenizer=TokenizerSettings(dir="tokenizer"))
    monkeypatch.setattr(launch, "parse_command_line", lambda argv, entry, more_outlook: settings)


def failing(error: BaseException | None) -> Callable[..., None]:
    def body(settings: object, stop: object) -> None:
        if error is not None:
            raise error

    return body


@pytest.mark.usefixtures("_good_settings")
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (Preempted("stopped after step 3"), 75),
        (DataError("data.sft: empty"), 2),
        (RolloutError("no engine"), 1),
        (ZeroDivisionError("a mistake of ours"), 1),
    ],
)
def test_rank_0_leaves_its_status_in_the_file(monkeypatch, tmp_path, error, status):
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    assert run_entry("sft", failing(error), []) == status
    assert (tmp_path / "status").read_text() == f"{status}\n"


@pytest.mark.usefixtures("_good_settings")
def test_other_ranks_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    monkeypatch.setenv("RANK", "1")
    assert run_entry("rl", failing(Preempted("stopped")), []) == 75
    assert not (tmp_path / "status").exists()


def test_refused_settings_are_told_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    with pytest.raises(SystemExit):
        run_entry("sft", failing(None), ["nowhere.yaml"])
    assert (tmp_path / "status").read_text() == "2\n"
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.usefixtures("_good_settings")
def test_file_that_cannot_be_written_is_named_and_changes_nothing(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "nowhere" / "status"))
    assert run_entry("sft", failing(None), []) == 0
    assert STATUS_FILE in capsys.readouterr().err


@pytest.mark.usefixtures("_good_settings")
@pytest.mark.parametrize(("error", "status"), [(Preempted("stopped"), 75), (DataError("gone"), 2), (OSError(), 1)])
def test_the_status_is_there_before_engines_are_closed(monkeypatch, tmp_path, error, status):
    file = tmp_path / "status"
    monkeypatch.setenv(STATUS_FILE, str(file))
    seen = []

    @contextmanager
    def engines() -> Iterator[None]:
        try:
            yield
        finally:
            seen.append(file.read_text())

    def body(settings: object, stop: object) -> None:
        with engines(), told_at_once():
            raise error

    assert run_entry("rl", body, []) == status
    assert seen == [f"{status}\n"]


def test_what_does_not_close_is_left_and_named_and_keeps_nothing_else_open(caplog):
    never, closed = threading.Event(), []

    def fail() -> None:
        raise OSError("no such engine")

    closed_within(0.5, engines=never.wait, graders=lambda: closed.append(1), others=fail)
    assert closed == [1]
    assert "the engines did not close within" in caplog.text
    assert "no such engine" in caplog.text
    never.set()
