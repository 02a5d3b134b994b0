"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from megatron_klear.observe.readable import byte_size, duration, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.5, "0.500"), (1.0, "1.00"), (12.345, "12.3"), (999.4, "999"), (999.6, "1.00k"), (1234.5, "1.23k"),
        (99_960, "100k"), (2.5e6, "2.50M"), (3e9, "3.00G"), (7e12, "7.00T"), (-1234.5, "-1.23k"), (2.5e-5, "2.50e-05"),
        (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_quantity(value, text) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0:00"), (7, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (2 * 86400 + 11045, "2d 03:04:05")],
)
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 << 30, "3.00 GiB")])
def test_byte_size(count, text) -> None:
    assert byte_size(count) == text
