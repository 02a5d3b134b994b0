"""Whose words reach the user when one rank fails."""

from __future__ import annotations

import errno
import os

from megatron_klear.checkpoint.collective import cause_of
from megatron_klear.errors import RolloutError


def raised_inside(first: BaseException, second: BaseException) -> BaseException:
    """The second error, as if raised while the first was handled."""
    second.__context__ = first
    return second


def test_a_full_disk_is_told_instead_of_the_writer_s_error_about_it() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cause_of(raised_inside(full, RuntimeError("[enforce fail at inline_container.cc]"))) is full


def test_a_time_limit_without_words_does_not_take_the_place_of_the_error_it_led_to() -> None:
    said = RolloutError("step 4 waits for 4 prompt groups")
    assert cause_of(raised_inside(TimeoutError(), said)) is said
