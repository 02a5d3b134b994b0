"""Pictures, read back from their SVG: curves stand where the numbers say, in colours that can be told apart."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from megatron_klear.observe.charts import BLUE, Chart, Line, Panel
from megatron_klear.observe.plots import chart_svgs
from megatron_klear.observe.series import PhaseLog, Series, add, smooth, smooth_median, split_phases, thin
from megatron_klear.observe.theme import DARK_PALETTE, LIGHT_PALETTE, PAGE


def series(values, steps=None) -> Series:
    values = np.array(values, dtype=np.float64)
    return Series(
        np.arange(len(values), dtype=np.float64) if steps is None else np.array(steps, dtype=np.float64), values
    )


def chart(*lines: Line, **changes) -> Chart:
    return Chart(key="c", title="T", y_label="y", note="n", panels=(Panel("rl", lines),), **changes)


def picture(drawn: Chart) -> str:
    (svg,) = chart_svgs(drawn)
    return svg


def points_of(svg: str, color: int) -> np.ndarray:
    """Points of the only unfilled path in a palette colour, [K, 2]."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c{color}\)[^"]*stroke-width: 2', svg)
    assert len(paths) == 1
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", paths[0])])


def test_a_curve_is_an_affine_picture_of_its_numbers() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    steps = [1, 2, 5, 6, 10]
    drawn = points_of(picture(chart(Line("a", series(values, steps), BLUE))), BLUE)
    for axis, true in ((0, steps), (1, values)):
        slope, offset = np.polyfit(true, drawn[:, axis], 1)
        np.testing.assert_allclose(slope * np.array(true) + offset, drawn[:, axis], atol=1e-3)
        assert (slope > 0) == (axis == 0)  # up the page is down the axis of SVG


def test_values_that_are_not_finite_leave_a_mark_and_no_point() -> None:
    svg = picture(chart(Line("a", series([1.0, math.nan, 3.0, math.inf]), BLUE)))
    assert len(points_of(svg, BLUE)) == 2
    assert "var(--c3)" in svg
    assert " nan" not in svg


def test_the_colours_of_the_page_are_variables_and_nothing_else() -> None:
    svg = picture(
        chart(Line("a", series([1.0, 2.0]), BLUE, error=series([0.1, 0.2])), Line("b", series([2.0, 1.0]), 5))
    )
    assert re.findall(r"#[0-9a-fA-F]{6}", svg) == []
    assert {"var(--muted)", "var(--grid)", "var(--c0)", "var(--c5)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert len(set(PAGE.palette)) == len(LIGHT_PALETTE)


def test_panels_that_share_an_axis_have_the_same_ticks() -> None:
    panels = tuple(
        Panel(phase, (Line("a", series(values), BLUE),)) for phase, values in (("sft", [0, 1]), ("rl", [1, 8]))
    )
    shared, alone = (
        chart_svgs(Chart("c", "T", "y", "n", panels, from_zero=True, share_y=share)) for share in (True, False)
    )
    ticks = [
        [re.findall(r">([\d.]+)</text>", svg.split("matplotlib.axis_2")[1]) for svg in svgs] for svgs in (shared, alone)
    ]
    assert ticks[0][0] == ticks[0][1]
    assert ticks[1][0] != ticks[1][1]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("palette", "card"), [(LIGHT_PALETTE, "#ffffff"), (DARK_PALETTE, "#1a1e26")])
def test_curves_stand_out_from_the_paper(palette, card) -> None:
    for color in palette:
        low, high = sorted([luminance(color), luminance(card)])
        assert (high + 0.05) / (low + 0.05) >= 2.9, color


def test_smoothing_against_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 5, 8):
        reach = window // 2
        cut = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
        np.testing.assert_allclose(smooth(values, window), [part.mean() for part in cut])
        np.testing.assert_allclose(smooth_median(values, window), [np.median(part) for part in cut])


def test_thinning_keeps_every_spike_and_the_order() -> None:
    values = np.zeros(10_000)
    values[[17, 5_003, 9_998]] = [5.0, -7.0, 9.0]
    thinned = thin(series(values), 600)
    assert len(thinned) <= 600
    assert {5.0, -7.0, 9.0} <= set(thinned.values)
    assert (np.diff(thinned.steps) > 0).all()
    short = series([1.0, 2.0])
    assert thin(short, 600) is short


def test_a_sum_counts_what_is_missing_as_zero() -> None:
    total = add([series([1.0, 2.0], [1, 2]), series([10.0, math.nan], [2, 3])])
    assert total.steps.tolist() == [1, 2, 3]
    assert total.values.tolist() == [1.0, 12.0, 0.0]


def test_a_step_logged_twice_counts_as_logged_last() -> None:
    log = PhaseLog("rl", [{"step": 2, "a": 1.0}, {"step": 1, "a": 5}, {"step": 2, "a": 3.0}, {"step": 3, "a": "text"}])
    found = log.series("a")
    assert found.steps.tolist() == [1, 2]
    assert found.values.tolist() == [5.0, 3.0]
    assert (found.first, found.last) == (5.0, 3.0)


def test_evaluations_belong_to_the_training_around_them() -> None:
    def row(phase: str, step: int) -> dict:
        return {"phase": phase, "step": step}

    rows = [row("eval", 0), row("sft", 1), row("eval", 1), row("rl", 1), row("eval", 2)]
    found = {log.phase: [(r["phase"], r["step"]) for r in log.rows] for log in split_phases(rows)}
    assert found == {"sft": [("eval", 0), ("sft", 1), ("eval", 1)], "rl": [("rl", 1), ("eval", 2)]}
    assert [log.phase for log in split_phases([row("eval", 0)])] == ["eval"]
    assert split_phases([]) == ()
