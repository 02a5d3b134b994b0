"""Whether what code printed or returned is what a test expects; runs outside the sandbox."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from typing import Any

# Without zeros in front: 0011 is a name or a string of bits and not eleven.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_LONGEST_NUMBER = 100
_SHOWN = 40
_SMALLEST_ERROR = 1e-12
"""Allowed in results of calls whatever their size, as pytest.approx does: the noise of a sum that should be zero."""


def different_text(expected: str, output: bytes, tolerance: float) -> str:
    """What is wrong with printed text, or an empty text.

    Lines are compared without space at their ends, the whole without empty lines around it. A line that differs is
    compared word by word, however they are spaced: words that are numbers, without zeros in front, are equal as
    decimals (1.0 is 1), or within `tolerance`.

    Args:
        expected: what a right program prints.
        output: what was printed; bytes that are no UTF-8 are equal to nothing.
        tolerance: allowed error, absolute or relative to the expected number, whichever is larger.
    """
    wanted, got = _lines(expected), _lines(output.decode("utf-8", "replace"))
    for number, (line, other) in enumerate(zip_longest(wanted, got), start=1):
        if line != other and not (line is not None and other is not None and _equal_words(line, other, tolerance)):
            return f"line {number} is {_shown(other)}, expected {_shown(line)}"
    return ""


def different_value(expected: Any, output: bytes, tolerance: float) -> str:
    """What is wrong with a call's result, or an empty text.

    Args:
        expected: JSON data.
        output: the result as JSON.
        tolerance: allowed error of numbers that are not whole, relative to the expected one (1e-12 at least).
    """
    if not output:
        return "the call gave no result"
    try:
        result = json.loads(output)
        equal = _equal(expected, result, tolerance)
    except (ValueError, RecursionError):
        return "the result cannot be read"
    return "" if equal else f"the result is {_shown(json.dumps(result))}, expected {_shown(json.dumps(expected))}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]


def _equal_words(line: str, other: str, tolerance: float) -> bool:
    words, others = line.split(), other.split()
    return len(words) == len(others) and all(
        a == b or _equal_numbers(a, b, tolerance) for a, b in zip(words, others, strict=True)
    )


def _equal_numbers(expected: str, got: str, tolerance: float) -> bool:
    if max(len(expected), len(got)) > _LONGEST_NUMBER or not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(got)):
        return False
    try:
        if Decimal(expected) == Decimal(got):
            return True
    except InvalidOperation:
        return False
    wanted = float(expected)
    return tolerance > 0 and _within(wanted, float(got), tolerance * max(1.0, abs(wanted)))


def _within(expected: float, got: float, error: float) -> bool:
    """Whether two finite numbers are that close; infinite ones have no distance."""
    return math.isfinite(expected) and math.isfinite(got) and abs(expected - got) <= error


def _equal(expected: Any, got: Any, tolerance: float) -> bool:
    """Equality of JSON data; whole numbers exactly, true and false being no numbers."""
    if isinstance(expected, bool) or isinstance(got, bool) or expected is None or got is None:
        return expected is got
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if isinstance(expected, int):
            return expected == got
        if math.isnan(expected):
            return isinstance(got, float) and math.isnan(got)
        try:
            error = max(tolerance * abs(expected), _SMALLEST_ERROR if tolerance else 0.0)
            return expected == got or _within(expected, float(got), error)
        except OverflowError:  # a whole number beyond the floats
            return False
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(_equal(a, b, tolerance) for a, b in zip(expected, got, strict=True))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(_equal(expected[key], got[key], tolerance) for key in expected)
    return bool(type(expected) is type(got) and expected == got)


def _shown(text: str | None) -> str:
    if text is None:
        return "missing"
    text = "".join(char if char.isprintable() else "?" for char in text[: _SHOWN + 1])
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")
