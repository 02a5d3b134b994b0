"""What a stage did with its rows: counts, reasons, tables for plots, and a few examples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_klear.curation.row import Row

EXAMPLES_PER_REASON = 4
_SHOWN_CHARACTERS = 600


@dataclass(slots=True)
class Audit:
    """Counts of one stage over some of its input; audits of parts add up to that of the stage.

    Attributes:
        rows_in, rows_out: rows that came and went.
        dropped: rows by the reason for which a rule left them out.
        rejected: rows by the kind of fault that makes them unusable.
        tables: counts by table and key, for plots and reading.
        examples: by reason, a few rows: {"id", "text", "detail"}.
    """

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    tables: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def count(self, table: str, key: str, number: int = 1) -> None:
        """Add to a table."""
        self.tables.setdefault(table, Counter())[key] += number

    def example(self, reason: str, row: Row, detail: str = "") -> None:
        """Keep a row to be read, if there are not enough for the reason already."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_PER_REASON:
            text = row.prompt_text
            shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
            kept.append({"id": row.row_id, "text": shown, "detail": detail})

    def to_object(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(self.dropped),
            "rejected": dict(self.rejected),
            "tables": {name: dict(counts) for name, counts in self.tables.items()},
            "examples": self.examples,
        }


def merged(parts: Iterable[Mapping[str, Any]]) -> Audit:
    """One audit of several, given as `to_object` makes them, in the order of the input."""
    total = Audit()
    for part in parts:
        total.rows_in += part["rows_in"]
        total.rows_out += part["rows_out"]
        total.dropped.update(part["dropped"])
        total.rejected.update(part["rejected"])
        for name, counts in part["tables"].items():
            total.tables.setdefault(name, Counter()).update(counts)
        for reason, rows in part["examples"].items():
            kept = total.examples.setdefault(reason, [])
            kept += rows[: EXAMPLES_PER_REASON - len(kept)]
    return total
