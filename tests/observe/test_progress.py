"""The progress display: lines that do not flood a log, a live display that ends properly."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from megatron_klear.observe.names import ACCURACY_HELDOUT, LOSS_TOTAL, REWARD_MEAN, TOKENS_PER_SECOND
from megatron_klear.observe.progress import Progress, TimeLeft


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_the_median_and_ignores_one_slow_step() -> None:
    left = TimeLeft()
    assert left.estimate(10) is None
    for seconds in (60.0, 2.0, 2.0, 2.5, 1.5):
        left.add(seconds)
    assert left.estimate(10) == 20.0
    assert left.estimate(0) == 0.0


def test_time_left_forgets_old_steps() -> None:
    left = TimeLeft(window=3)
    for seconds in (9.0, 9.0, 9.0, 1.0, 1.0, 1.0):
        left.add(seconds)
    assert left.estimate(2) == 2.0


def test_a_log_gets_one_line_per_interval_and_always_the_last_step() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("RL", 100, stream=stream, line_seconds=10.0, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.step(step, {LOSS_TOTAL: 0.5, REWARD_MEAN: 0.25, TOKENS_PER_SECOND: 1234.0})
    lines = stream.getvalue().splitlines()
    assert [int(re.search(r"step (\d+)/100", line)[1]) for line in lines] == [*range(1, 101, 10), 100]
    assert lines[1] == "[RL] step 11/100  loss 0.500  reward 0.250  tokens/s 1.23k  elapsed 0:11  left 1:29"
    assert lines[-1] == "[RL] step 100/100  loss 0.500  reward 0.250  tokens/s 1.23k  elapsed 1:40"


def test_a_log_gets_no_control_codes_even_with_forced_colours(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    with Progress("SFT", 2, stream=stream, line_seconds=0.0) as progress:
        with progress.phase("generating", total=3) as advance:
            advance()
        progress.note("a [bold]note[/bold] with \x1b[31mred\r and a bell \x07")
        progress.step(1, {LOSS_TOTAL: float("nan")})
    text = stream.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "[bold]note[/bold]" in text
    assert "loss nan" in text


def test_a_long_phase_reports_in_between() -> None:
    stream, clock = io.StringIO(), Clock()
    with (
        Progress("RL", 5, done_steps=2, stream=stream, line_seconds=10.0, clock=clock) as progress,
        progress.phase("generating", total=128) as advance,
    ):
        for _ in range(128):
            clock.now += 0.25
            advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[RL] step 3/5 generating 1/128  elapsed 0:00"
    assert lines[1] == "[RL] step 3/5 generating 41/128  elapsed 0:10"
    assert len(lines) == 4


def test_time_left_counts_the_part_of_the_step_that_has_passed() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("RL", 3, stream=stream, line_seconds=0.0, clock=clock) as progress:
        clock.now += 10
        progress.step(1, {})
        with progress.phase("training") as advance:
            clock.now += 4
            advance()
    first, second = stream.getvalue().splitlines()
    assert first.endswith("left 0:20")
    assert second == "[RL] step 2/3 training 1  elapsed 0:14  left 0:16"


def test_an_exception_is_told_and_passes_through() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("SFT", 9, done_steps=3, stream=stream):
        _ = 1 / 0
    assert stream.getvalue() == "[SFT] stopped by ZeroDivisionError in step 4/9\n"


def test_other_ranks_show_nothing() -> None:
    for interactive in (False, True):
        stream = io.StringIO()
        with (
            Progress("SFT", 9, enabled=False, stream=stream, interactive=interactive) as progress,
            progress.phase("training", total=2) as advance,
        ):
            advance()
            progress.step(9, {LOSS_TOTAL: 1.0})
            progress.note("hello")
        assert stream.getvalue() == ""


def test_a_closed_stream_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress("SFT", 2, stream=Broken(), line_seconds=0.0) as progress:
        progress.step(1, {})
        progress.step(2, {})
    assert progress.done_steps == 2


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_steps_phase_and_numbers(terminal) -> None:
    with Progress("RL", 10, stream=terminal) as progress:
        progress.step(4, {LOSS_TOTAL: 0.125, REWARD_MEAN: 0.5})
        progress.update({ACCURACY_HELDOUT: 0.625})
        with progress.phase("generating", total=128) as advance:
            advance(37)
            progress.note("an evaluation went well")
            assert progress._live is not None
            progress._live.refresh()
    text = plain(terminal.getvalue())
    for expected in ("step 4/10", "generating", "37/128", "loss 0.125", "reward 0.500", "held-out 0.625", "elapsed"):
        assert expected in text
    assert "an evaluation went well" in text


def test_a_terminal_gets_its_cursor_back_after_a_failure(terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("RL", 10, stream=terminal):
        raise KeyboardInterrupt
    text = terminal.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_log_handlers_print_above_the_display_and_are_given_back(terminal, monkeypatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Progress("RL", 10, stream=terminal):
            root.warning("disk is nearly full")
            assert handler.stream is not sys.__stderr__
        assert handler.stream is sys.__stderr__
    finally:
        root.removeHandler(handler)
    assert "disk is nearly full" in plain(terminal.getvalue())


def test_a_dumb_terminal_gets_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("RL", 1, stream=stream) as progress:
        progress.step(1, {})
    assert stream.getvalue() == "[RL] step 1/1  elapsed 0:00\n"
