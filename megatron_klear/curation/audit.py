"""What a stage did with its rows: counts, reasons, tables for plots, and a few examples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_klear.curation.row import Row

EXAMPLES_PER_REASON = 4
KEYS_PER_TABLE = 10_000
"""Keys that a table counts apart; what comes after them is counted together, so that memory does not grow with it."""

OTHERS = "(others)"
_SHOWN_CHARACTERS, _LABEL_CHARACTERS = 600, 200


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
        """Add to a table.

        Args:
            table: its name.
            key: row of the table, shortened where it is long; `OTHERS` where the table has too many rows already.
            number: how much to add.
        """
        counts = self.tables.setdefault(table, Counter())
        key = _shortened(key, _LABEL_CHARACTERS)
        counts[key if key in counts or len(counts) < KEYS_PER_TABLE else OTHERS] += number

    def example(self, reason: str, row: Row, detail: str = "") -> None:
        """Keep a row to be read, if there are not enough for the reason already."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES_PER_REASON:
            text = _shortened(row.prompt_text, _SHOWN_CHARACTERS)
            shown_id = _shortened(row.row_id, _LABEL_CHARACTERS)
            kept.append({"id": shown_id, "text": text, "detail": _shortened(detail, _SHOWN_CHARACTERS)})

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


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def merged(parts: Iterable[Mapping[str, Any]]) -> Audit:
    """One audit of several, given as `to_object` makes them, in the order of the input."""
    total = Audit()
    for part in parts:
        total.rows_in += part["rows_in"]
        total.rows_out += part["rows_out"]
        total.dropped.update(part["dropped"])
        total.rejected.update(part["rejected"])
        for name, counts in part["tables"].items():
            for key, number in counts.items():
                total.count(name, key, number)
        for reason, rows in part["examples"].items():
            kept = total.examples.setdefault(reason, [])
            kept += rows[: EXAMPLES_PER_REASON - len(kept)]
    return total
