"""Values of the standard library that travel between processes as a kind and a text: numbers, dates and times."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any


def _timedelta(text: str) -> timedelta:
    days, seconds, microseconds = map(int, text.split())
    return timedelta(days, seconds, microseconds)


_WRITE: dict[type, Callable[[Any], str]] = {
    complex: str,
    Decimal: str,
    Fraction: str,
    date: date.isoformat,
    datetime: datetime.isoformat,
    time: time.isoformat,
    timedelta: lambda value: f"{value.days} {value.seconds} {value.microseconds}",
}
_READ: dict[str, Callable[[str], Any]] = {
    "complex": complex,
    "Decimal": Decimal,
    "Fraction": Fraction,
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": _timedelta,
}


def to_text(value: Any) -> tuple[str, str] | None:
    """Kind and text of a value of exactly one of these types; None for any other."""
    write = _WRITE.get(type(value))
    return None if write is None else (type(value).__name__, write(value))


def is_text(kind: str) -> bool:
    """Whether this is the kind of a text."""
    return kind in _READ


def from_text(kind: str, text: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: the text is of no such value.
    """
    return _READ[kind](text)
