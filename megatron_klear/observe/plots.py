"""Draws charts with matplotlib: inline SVG for the page, one PNG for everything else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_klear.observe.charts import PHASE_TITLES, Chart, Line, Panel
from megatron_klear.observe.readable import byte_size, quantity
from megatron_klear.observe.series import Floats, Series, smooth, smooth_median, thin
from megatron_klear.observe.theme import PAGE, PRINT, Theme, inline_svg, rc_params

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 600
SMOOTH_FROM = 24
"""Curves with at least this many points get a moving average over the faint curve of every step."""

_SUMMARY_KEYS = ("accuracy", "loss", "reward", "length", "entropy", "clip", "grad_norm", "kl", "speed", "grades")
_SUMMARY_OF_ALL_PHASES = ("accuracy", "loss")


def chart_svgs(chart: Chart) -> list[str]:
    """One SVG per panel to stand in the report's page, in the page's colours; the page adds title and legend."""
    from matplotlib import rc_context

    with rc_context(rc_params(PAGE, size=9.0)):
        several = len(chart.panels) > 1
        figures = [_new_figure((4.65, 2.7)) for _ in chart.panels]
        axes = [_grid(figure, 1, 1, top=0.32 if several else 0.12, above=0.0)[0] for figure in figures]
        for panel, ax in zip(chart.panels, axes, strict=True):
            _draw_panel(ax, chart, panel, PAGE)
            if several:
                ax.set_title(PHASE_TITLES.get(panel.phase, panel.phase), loc="left")
        _share_y(chart, axes)
        return [_svg_of(figure, chart, panel) for figure, panel in zip(figures, chart.panels, strict=True)]


def _svg_of(figure: Figure, chart: Chart, panel: Panel) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    title = escape(f"{chart.title}, {chart.y_label}, {PHASE_TITLES.get(panel.phase, panel.phase)}", quote=True)
    return inline_svg(buffer.getvalue(), key=f"{chart.key}-{panel.phase}", title=title)


def write_summary_png(charts: Sequence[Chart], path: Path, *, title: str) -> None:
    """The most important charts in one PNG, dark on white; one with a plain sentence where there is nothing to draw."""
    from matplotlib import rc_context

    panels = _summary_panels(charts)
    columns = 2 if len(panels) in (2, 4) else max(min(3, len(panels)), 1)
    rows = max(-(-len(panels) // columns), 1)
    with rc_context(rc_params(PRINT, size=9.0)):
        figure = _new_figure((4.6 * columns, 3.3 * rows + 0.5))
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        if not panels:
            figure.text(0.5, 0.45, "No metrics were written yet.", ha="center", color=PRINT.muted)
        grid = _grid(figure, rows, columns, top=0.5, above=0.75) if panels else []
        for ax in grid[len(panels) :]:
            ax.remove()
        several = len({panel.phase for _, panel in panels}) > 1
        for (chart, panel), ax in zip(panels, grid, strict=False):
            _draw_panel(ax, chart, panel, PRINT)
            phase = f" ({PHASE_TITLES.get(panel.phase, panel.phase)})" if several else ""
            has_legend = len(panel.lines) > 1
            ax.set_title(chart.title + phase, loc="left", pad=(34 if len(panel.lines) > 2 else 20) if has_legend else 8)
            if has_legend:
                # Long labels would run past the panel's edge in two columns at full size.
                crowded = max(len(str(line.label)) for line in panel.lines) > 20
                ax.legend(
                    loc="lower left",
                    bbox_to_anchor=(-0.02, 0.98),
                    ncol=2,
                    handlelength=1.2 if crowded else 1.6,
                    columnspacing=0.8 if crowded else 1.2,
                    fontsize=7.0 if crowded else None,
                )
        for chart in {chart.key: chart for chart, _ in panels}.values():
            _share_y(chart, [ax for (c, _), ax in zip(panels, grid, strict=False) if c is chart])
        figure.savefig(path, format="png", dpi=140)


def _summary_panels(charts: Sequence[Chart]) -> list[tuple[Chart, Panel]]:
    """Panels of the PNG: all phases of accuracy and loss, the last phase of the others, in full rows of three."""
    by_key = {chart.key: chart for chart in charts}
    panels: list[tuple[Chart, Panel]] = []
    for chart in (by_key[key] for key in _SUMMARY_KEYS if key in by_key):
        shown = chart.panels if chart.key in _SUMMARY_OF_ALL_PHASES else chart.panels[-1:]
        panels += [(chart, panel) for panel in shown]
    return panels[: len(panels) // 3 * 3] if len(panels) > 6 else panels


def _new_figure(size: tuple[float, float]) -> Figure:
    # Not pyplot: it keeps figures in a process-wide list and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _grid(figure: Figure, rows: int, columns: int, *, top: float, above: float) -> list[Axes]:
    """Axes with the same margins everywhere, in inches: `top` over the figure's axes, `above` over each row's.

    Fixed margins line pictures up with one another, and take a fraction of the time that fitting them takes.
    """
    left, right, bottom = 0.78, 0.12, 0.46
    width, height = figure.get_size_inches()
    cell = (height - top) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - (top + above) / height,
        wspace=(left + right) / (width / columns - left - right),
        hspace=(bottom + above) / (cell - bottom - above),
    )
    return list(figure.subplots(rows, columns, squeeze=False).ravel())


def _share_y(chart: Chart, axes: Sequence[Axes]) -> None:
    """Gives all panels of the chart one axis, if it asks for that."""
    if not chart.share_y or not axes:
        return
    top = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(0 if chart.from_zero else None, min(max(top, 0.1), 1.02) if chart.values == "percent" else top)


def _draw_panel(ax: Axes, chart: Chart, panel: Panel, theme: Theme) -> None:
    if chart.stacked:
        _draw_stack(ax, panel.lines, theme)
    else:
        for line in panel.lines:
            _draw_line(ax, line, theme, spiky=chart.spiky, faint=0.35 if len(panel.lines) <= 2 else 0.15)
        _mark_not_finite(ax, panel.lines, theme)
    _format_axes(ax, chart, panel)


def _draw_line(ax: Axes, line: Line, theme: Theme, *, spiky: bool, faint: float) -> None:
    color = theme.palette[line.color]
    series = line.series.finite
    if not len(series):
        return
    error = line.error.at(series.steps) if line.error is not None and len(line.error) else None
    if line.points:
        bars = None if error is None else np.nan_to_num(error)
        ax.errorbar(
            series.steps, series.values, yerr=bars, color=color, label=line.label,
            linewidth=2.0, marker="o", markersize=5, capsize=3, elinewidth=1.2, zorder=4,
        )  # fmt: skip
        return
    if error is not None:
        _draw_band(ax, series, error, color)
    style: dict[str, Any] = {"color": color, "linestyle": (0, (4, 2)) if line.dashed else "-"}
    if len(series) < SMOOTH_FROM or not line.smooth:
        series = thin(series, _MAX_POINTS)
        marker = "o" if len(series) <= 12 else None
        ax.plot(series.steps, series.values, label=line.label, linewidth=2.0, marker=marker, markersize=4, **style)
        return
    raw = thin(series, _MAX_POINTS)
    ax.plot(raw.steps, raw.values, color=color, linewidth=0.8, alpha=faint)
    middle = (smooth_median if spiky else smooth)(series.values, max(5, len(series) // 20))
    average = _every(Series(series.steps, middle), _MAX_POINTS)
    ax.plot(average.steps, average.values, label=line.label, linewidth=2.0, **style)


def _draw_band(ax: Axes, series: Series, error: Floats, color: str) -> None:
    if len(series) >= SMOOTH_FROM:
        window = max(5, len(series) // 20)
        middle = _every(Series(series.steps, smooth(series.values, window)), _MAX_POINTS)
        half = _every(Series(series.steps, smooth(error, window)), _MAX_POINTS).values
    else:
        middle, half = series, error
    ax.fill_between(middle.steps, middle.values - half, middle.values + half, color=color, alpha=0.14, linewidth=0)


def _draw_stack(ax: Axes, lines: Sequence[Line], theme: Theme) -> None:
    steps = np.unique(np.concatenate([line.series.steps for line in lines]))
    layers = np.stack([np.nan_to_num(line.series.at(steps), posinf=0.0, neginf=0.0) for line in lines])
    size = -(-len(steps) // 150)
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    heights = np.add.reduceat(layers, starts, axis=1) / counts  # means over stretches of steps
    width = float(np.median(np.diff(steps[starts]))) if len(starts) > 1 else 1.0
    centers = np.add.reduceat(steps, starts) / counts
    bottom = np.zeros(len(starts))
    for line, height in zip(lines, heights, strict=True):
        fill = theme.palette[line.color]
        if len(starts) <= 40:
            ax.bar(centers, height, width * 0.82, bottom, color=fill, linewidth=0, label=line.label)
        else:
            ax.fill_between(
                centers, bottom, bottom + height, step="mid", color=fill, linewidth=0, label=line.label
            )  # fmt: skip
        bottom = bottom + height


def _mark_not_finite(ax: Axes, lines: Sequence[Line], theme: Theme) -> None:
    bad = [line.series.steps[~np.isfinite(line.series.values)] for line in lines]
    steps = np.unique(np.concatenate(bad)) if bad else np.array([])
    if len(steps):
        ax.plot(
            steps, np.full(len(steps), 0.05), transform=ax.get_xaxis_transform(), linestyle="none", marker="x",
            color=theme.palette[3], markersize=6, markeredgewidth=1.6, label="NaN or infinite", clip_on=False,
        )  # fmt: skip


def _format_axes(ax: Axes, chart: Chart, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = [line.series.finite.values for line in panel.lines]
    flat = np.concatenate(values)
    steps = np.concatenate([line.series.steps for line in panel.lines])
    ax.set_xlabel("step")
    ax.set_ylabel(chart.y_label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if steps.min() == steps.max():
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    elif chart.stacked:
        ax.set_xlim(steps.min() - 0.7, steps.max() + 0.7)
    else:
        ax.margins(x=0.02)
    if _needs_log(flat, chart):
        ax.set_yscale("log")
        return
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if chart.from_zero:
        highest = float(flat.max()) if len(flat) else 0.0
        ax.set_ylim(0, max(ax.get_ylim()[1], highest * 1.06, 1e-12))
    if chart.values == "percent":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif chart.values == "quantity":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    elif chart.values == "bytes":
        # Round numbers of the binary unit, not of bytes.
        unit = 1024.0 ** max(int(np.log2(ax.get_ylim()[1]) // 10), 0)
        ax.set_yticks([tick * unit for tick in MaxNLocator(nbins=5).tick_values(0, ax.get_ylim()[1] / unit)][:-1])
        name = byte_size(unit).split()[1]
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:.3g} {name}"))
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _needs_log(values: Floats, chart: Chart) -> bool:
    """Curves with spikes far above their usual height are legible only on a logarithmic axis."""
    if not chart.spiky or len(values) < 3 or values.min() <= 0:
        return False
    return bool(values.max() > 30 * np.median(values))


def _plain(value: float) -> str:
    """A number on an axis: as it is, or as `2.5e-4` where it is very small or large."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    digits, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")


def _short(value: float) -> str:
    text = quantity(value)
    digits, letter = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + letter


def _every(series: Series, limit: int) -> Series:
    stride = max(1, -(-len(series) // limit))
    return Series(series.steps[::stride], series.values[::stride])
