"""The report of a run: report.html, which needs nothing but itself, and report.png."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from megatron_klear import __version__
from megatron_klear.observe.charts import PHASE_TITLES, Chart, build_charts
from megatron_klear.observe.examples import read_examples
from megatron_klear.observe.metrics import METRICS_FILE, read_metrics
from megatron_klear.observe.page import TEMPLATE, fill, style_sheet
from megatron_klear.observe.plots import SMOOTH_FROM, chart_svgs, write_summary_png
from megatron_klear.observe.replace import replace_file
from megatron_klear.observe.series import PhaseLog, split_phases
from megatron_klear.observe.summary import accuracies, headline, last_values, pick_rollouts, tiles
from megatron_klear.observe.theme import DARK_PALETTE, LIGHT_PALETTE

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
PICTURE_FILE = "report.png"
CONFIG_FILE = "config.yaml"


def write_report(run_dir: str | Path, sft_run_dir: str | Path | None = None) -> Path:
    """Writes report.html and report.png of a run, as far as there is anything to show; returns the page's path.

    Args:
        run_dir: the run directory; metrics, examples and settings may each be missing.
        sft_run_dir: the SFT run that an RL run started from, shown in the same report. None looks whether a path
            in the run's settings lies in the directory of an SFT run.

    Raises:
        OSError: if the report cannot be written.
    """
    run_dir = Path(run_dir)
    logs = _read_logs(run_dir)
    if sft_run_dir is None and not any(log.phase == "sft" for log in logs):
        sft_run_dir = find_sft_run(run_dir)
    before = _read_logs(Path(sft_run_dir)) if sft_run_dir is not None else ()
    logs = (*(log for log in before if log.phase == "sft"), *logs)
    points = accuracies(logs)
    charts = build_charts(logs)
    title = " and ".join(PHASE_TITLES.get(log.phase, log.phase) for log in logs) or "Run"
    folders = [Path(folder) for folder in (sft_run_dir, run_dir) if folder is not None]
    values = {
        "title": f"{title} report",
        "subtitle": " after ".join(str(folder) for folder in reversed(folders)),
        "style": style_sheet(LIGHT_PALETTE, DARK_PALETTE),
        "headline": headline(points),
        "tiles": tiles(logs, points),
        "accuracies": [_accuracy_row(point) for point in points],
        "charts": [_chart_card(chart) for chart in charts],
        "smoothed": max((log.last_step for log in logs), default=0) >= SMOOTH_FROM,
        "several_phases": len(logs) > 1,
        "rollouts": pick_rollouts(read_examples(run_dir)),
        "settings": [file for folder in reversed(folders) for file in _settings(folder, run_dir)],
        "numbers": [{"title": PHASE_TITLES.get(log.phase, log.phase), "rows": last_values(log)} for log in logs],
        "footer": f"Written by megatron_klear {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    }
    page = run_dir / REPORT_FILE
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(page, fill(TEMPLATE, values))
    picture = run_dir / f".{PICTURE_FILE}.part"
    write_summary_png(charts, picture, title=f"{title} report: {run_dir.resolve().name}")
    os.replace(picture, run_dir / PICTURE_FILE)
    return page


def find_sft_run(run_dir: Path) -> Path | None:
    """The SFT run that the settings of a run point into, for instance through the model to start from.

    Any setting counts whose value is a path inside another run directory with SFT metrics; None if there is none.
    """
    import yaml

    try:
        settings = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    for text in _texts(settings):
        if "/" not in text or "\n" in text or len(text) > 4000:
            continue
        path = Path(text).expanduser().absolute()
        for folder in (path, *list(path.parents)[:3]):
            if folder == run_dir.absolute() or not (folder / METRICS_FILE).is_file():
                continue
            if any(log.phase == "sft" for log in _read_logs(folder)):
                return folder
    return None


def _read_logs(run_dir: Path) -> tuple[PhaseLog, ...]:
    try:
        return split_phases(read_metrics(run_dir))
    except OSError as error:
        logger.warning("report without metrics: %s", error)
        return ()


def _texts(settings: Any) -> Iterator[str]:
    """Every string in a tree of mappings and lists."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, (dict, list)):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _texts(value)


def _settings(folder: Path, run_dir: Path) -> list[dict[str, str]]:
    path = folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    link = quote(Path(os.path.relpath(path, run_dir)).as_posix())
    return [{"name": str(path), "link": link, "text": text}]


def _accuracy_row(point: Any) -> dict[str, str]:
    return {
        "label": point.label,
        "step": f"{point.step:,}",
        "accuracy": f"{point.value:.3f}",
        "stderr": "" if point.stderr is None else f"{point.stderr:.3f}",
        "counts": "" if point.count is None else f"{round(point.value * point.count):,} / {point.count:,}",
    }


def _chart_card(chart: Chart) -> dict[str, Any]:
    lines = {line.label: line for panel in chart.panels for line in panel.lines}
    return {
        "key": chart.key,
        "title": chart.title,
        "note": chart.note,
        "wide": len(chart.panels) > 1,
        "stacked": chart.stacked,
        "legend": list(lines.values()) if len(lines) > 1 else [],
        "not_finite": sum(
            int((~np.isfinite(line.series.values)).sum()) for panel in chart.panels for line in panel.lines
        ),
        "svgs": chart_svgs(chart),
    }
