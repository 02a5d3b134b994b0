"""Pictures of the audit: how many rows each stage left, and what the rows are like."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_klear.observe.charts import BLUE, GREEN, GREY, ORANGE, OUTCOME_COLORS, RED
from megatron_klear.observe.readable import quantity
from megatron_klear.observe.theme import PAGE, inline_svg, rc_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_klear.curation.pipeline import StageRecord

_BARS = 12
_LABEL = 34

# Tables that become a picture: title, note, and whether the keys have an order of their own.
_PICTURES = {
    "contaminated rows by benchmark": ("Contamination", "Rows that share an n-gram with each benchmark.", False),
    "problems by pass rate": ("Pass rate", "Problems by the share of responses that are correct.", True),
    "rows by difficulty": ("Difficulty", "Rows by label.", False),
    "responses by outcome": ("Grades", "What the grader said of the responses.", False),
    "code problems by number of tests": ("Tests", "Code problems by their number of tests.", True),
}


def audit_charts(records: Sequence[StageRecord], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The pictures for which there are numbers: {"key", "title", "note", "wide", "svg"} each."""
    charts = [
        _chart(
            "funnel",
            "Rows after each stage",
            "What is left of the input; a row to fine-tune on is one response.",
            [(titles[r.name], r.audit.rows_out, BLUE) for r in records],
            wide=True,
        )
    ]
    reasons = [
        (f"{reason}", count, color)
        for record in records
        for counts, color in ((record.audit.dropped, ORANGE), (record.audit.rejected, RED))
        for reason, count in counts.most_common()
    ]
    if reasons:
        charts.append(
            _chart(
                "reasons", "Why rows went", "Orange: dropped by a rule. Red: rejected as unusable.", reasons, wide=True
            )
        )
    for record in records:
        for table, (title, note, ordered) in _PICTURES.items():
            counts = record.audit.tables.get(table)
            if not counts:
                continue
            listed = sorted(counts.items(), key=lambda item: _number(item[0])) if ordered else counts.most_common()
            bars = [(key, count, OUTCOME_COLORS.get(key, GREY if key == "unknown" else BLUE)) for key, count in listed]
            charts.append(_chart(f"{record.name}-{table.replace(' ', '-')}", title, note, bars))
    for record in (records[0], records[-1]):
        counts = record.audit.tables.get("rows by source")
        if counts and len(counts) > 1:
            where = "Sources of the input" if record is records[0] else "Sources of the result"
            bars = [(key, count, GREEN) for key, count in counts.most_common()]
            charts.append(_chart(f"{record.name}-sources", where, "Rows by source.", bars))
    return charts


def _chart(
    key: str, title: str, note: str, bars: Sequence[tuple[str, int, int]], *, wide: bool = False
) -> dict[str, Any]:
    """Horizontal bars with their numbers, the longest tail summed up."""
    shown = list(bars[:_BARS])
    if len(bars) > _BARS:
        shown.append((f"{len(bars) - _BARS} others", sum(count for _, count, _ in bars[_BARS:]), GREY))
        note = f"{note} The {_BARS} largest."
    svg = inline_svg(_drawn(shown, wide), key=key, title=escape(title, quote=True))
    return {"key": key, "title": title, "note": note, "wide": wide, "svg": svg}


def _drawn(bars: Sequence[tuple[str, int, int]], wide: bool) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({**rc_params(PAGE, size=9.0), "text.parse_math": False}):  # a source may be called $\\frac$
        figure: Figure = Figure(figsize=(9.6 if wide else 4.65, 0.45 + 0.27 * len(bars)))
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        labels = [_short(label) for label, _, _ in bars]
        width, height = figure.get_size_inches()
        left = 0.25 + 0.066 * max(map(len, labels), default=1)
        figure.subplots_adjust(left=left / width, right=1 - 0.65 / width, bottom=0.3 / height, top=1 - 0.05 / height)
        places = range(len(bars))
        drawn = axes.barh(places, [count for _, count, _ in bars], color=[PAGE.palette[color] for _, _, color in bars])
        axes.bar_label(drawn, [f"{count:,}" for _, count, _ in bars], padding=4, color=PAGE.ink)
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", colors=PAGE.ink, length=0)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value) if value >= 10_000 else f"{value:,g}")
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Labels stay text in the picture, so that the browser's fonts draw what matplotlib's do not have.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, integer=True)


def _short(label: str) -> str:
    """A label on one line, of characters that can be seen and do not turn the others round."""
    label = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(label.split()))
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}\u2026"


def _number(key: str) -> tuple[float, int]:
    """Where a bucket such as `0.3 to 0.4`, `1` or `128 and more` stands; a single number before a range from it."""
    first = key.split(" ")[0]
    try:
        return float(first), len(key)
    except ValueError:
        return float("inf"), 0
