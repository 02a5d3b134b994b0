"""How many tests a code problem has, in the forms that tests are written down in."""

from __future__ import annotations

import json
from typing import Any

_LISTS = ("tests", "test_cases", "asserts", "inputs", "input")
"""Keys under which a problem has one entry per test."""


def count_tests(reference: str | None) -> int | str:
    """Number of tests of a code problem's reference, or why that cannot be said.

    Args:
        reference: JSON: a list with one entry per test, or an object with such a list under a key of `_LISTS`.
    """
    if reference is None:
        return "the row has no reference, which must hold the tests"
    try:
        value: Any = json.loads(reference)
    except (ValueError, RecursionError):
        return "the reference is not JSON"
    if isinstance(value, dict):
        value = next((value[key] for key in _LISTS if isinstance(value.get(key), list)), None)
    if not isinstance(value, list):
        return f"the reference holds no list of tests; it must be one, or have one under {', '.join(_LISTS)}"
    return len(value)
