"""The tables of `python -m megatron_klear.verify`: drawn for a terminal, plain text with one line per row otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_klear.conformance.matrix import ERROR_NAMES, SLACK, Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class EquationRow:
    """The outcome of one equation check.

    Attributes:
        name: what was compared.
        equation: where it stands in the paper.
        device: `cpu` or `cuda`.
        error, tolerance: largest absolute error, and what is allowed.
        passed: whether it holds.
    """

    name: str
    equation: str
    device: str
    error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRow:
    """The outcome of one layout.

    Attributes:
        label: the layout.
        processes, device: what it was to run on.
        comparison: its errors, or None when its launch ended before it.
    """

    label: str
    processes: int
    device: str
    comparison: Comparison | None

    @property
    def passed(self) -> bool:
        """Whether there are errors and all are within the limit."""
        return self.comparison is not None and self.comparison.passed


def equation_table(rows: Sequence[EquationRow], *, plain: bool) -> Table:
    """Checks of the equations."""
    table = _table("Equations, float64, largest absolute error", plain)
    for heading in ("check", "paper", "on"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "allowed", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        error = f"{row.error:.1e}" if row.error else "0"
        allowed = f"{row.tolerance:.0e}" if row.tolerance else "0"
        table.add_row(row.name, row.equation, row.device, error, allowed, _result(row.passed))
    return table


def layout_table(rows: Sequence[LayoutRow], *, plain: bool) -> Table:
    """Comparisons of the layouts."""
    title = "Layouts against one process in float64; an error of 1 is what the data type itself costs"
    table = _table(title, plain)
    table.add_column("layout", overflow="fold")
    for heading in ("processes", *(name.replace("_", " ") for name in ERROR_NAMES), "allowed", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        errors = [""] * len(ERROR_NAMES) if row.comparison is None else map(_number, row.comparison.errors.values())
        result = Text("NOT RUN", "bold red") if row.comparison is None else _result(row.passed)
        table.add_row(row.label, f"{row.processes} {row.device}", *errors, f"{SLACK:g}", result)
    return table


def summary(equations: Sequence[EquationRow], layouts: Sequence[LayoutRow], seconds: float) -> str:
    """One line: how many passed, and the time."""
    parts = [
        f"{sum(row.passed for row in rows)} of {len(rows)} {what} passed"
        for what, rows in (("equations", equations), ("layouts", layouts))
        if rows
    ]
    return f"verify: {', '.join(parts)}, {seconds:.0f} s"


def _table(title: str, plain: bool) -> Table:
    # MARKDOWN draws with characters that every terminal, log file and pager has.
    return Table(title=title, title_justify="left", box=box.MARKDOWN if plain else box.SIMPLE_HEAD)


def _number(error: float) -> Text:
    return Text(f"{error:.2f}" if abs(error) < 1e4 else f"{error:.1e}", "" if error <= SLACK else "bold red")


def _result(passed: bool) -> Text:
    return Text("pass", "green") if passed else Text("FAIL", "bold red")
