"""What the tables of a ledger have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich import box
from rich.table import Table

Row = TypeVar("Row")


def make_table(*names: str) -> Table:
    """A table whose columns of text are on the left; those that may be long are folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    texts = {"prompt", "state", "outcome", "end", "versions", "reason", "time", "event", "detail"}
    folded = {"versions", "reason", "detail"}
    for name in names:
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=name not in folded)
    return table


def up_to(rows: Sequence[Row], limit: int) -> Sequence[Row]:
    """The first `limit` rows; all of them where it is negative."""
    return rows if limit < 0 else rows[:limit]


def shown(rows: Sequence[object], limit: int) -> str:
    """Whether these rows, one more than `limit` where there are more, are all."""
    return f"the newest {limit} are shown (--limit)" if 0 <= limit < len(rows) else f"{len(rows)} shown"


def or_dash(value: float | None, form: str = "") -> str:
    """A number; a dash where there is none."""
    return "-" if value is None else format(value, form)


def span(oldest: int | None, newest: int | None) -> str:
    """Two numbers, or one where they are the same."""
    if oldest is None:
        return "-"
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"
