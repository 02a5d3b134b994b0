"""Colours and type of the report's pictures, for a page that may be light or dark."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, which people with any colour vision can tell apart; lighter shades on dark paper.
LIGHT_PALETTE = ("#0072b2", "#d97706", "#00845f", "#c0392b", "#a4538a", "#3d9fd6", "#a38a00", "#6b7280")
DARK_PALETTE = ("#5aaef0", "#f5a742", "#3fc79a", "#ff7a66", "#dc90c0", "#9bd3f7", "#ded05a", "#a3abb8")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a picture as matplotlib takes them.

    Attributes:
        ink: text.
        muted: axes and their labels.
        grid: grid lines.
        paper: background; "none" lets the page show through.
        palette: curve colours, by the places named in `charts`.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    palette: tuple[str, ...]


PRINT = Theme(ink="#1a1f2b", muted="#5b6472", grid="#e4e7ec", paper="#ffffff", palette=LIGHT_PALETTE)
"""For PNG: always dark ink on white paper."""

# Inline SVG takes its colours from the page's style sheet, so that one picture fits both light and dark: it is
# drawn in colours that mean nothing but a place, and these are then replaced by style sheet variables.
_VARIABLES = {
    "#01fe01": "var(--ink)",
    "#01fe02": "var(--muted)",
    "#01fe03": "var(--grid)",
    "#01fe04": "var(--card)",
    **{f"#02fe{i:02x}": f"var(--c{i})" for i in range(len(LIGHT_PALETTE))},
}
PAGE = Theme(
    ink="#01fe01",
    muted="#01fe02",
    grid="#01fe03",
    paper="#01fe04",
    palette=tuple(f"#02fe{i:02x}" for i in range(len(LIGHT_PALETTE))),
)


def rc_params(theme: Theme, *, size: float) -> dict[str, Any]:
    """matplotlib's settings for a theme; `size` is the size of text in points."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": size,
        "axes.titlesize": size,
        "axes.titleweight": "bold",
        "axes.titlecolor": theme.ink,
        "axes.labelsize": size,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": size,
        "ytick.labelsize": size,
        "xtick.major.size": 3.0,
        "ytick.major.size": 0.0,
        "ytick.minor.size": 0.0,
        "text.color": theme.ink,
        "figure.facecolor": "none" if theme is PAGE else theme.paper,
        "savefig.facecolor": "none" if theme is PAGE else theme.paper,
        "legend.frameon": False,
        "legend.fontsize": size,
        "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
        "svg.hashsalt": "megatron_klear",
        "path.simplify": True,
    }


def inline_svg(svg: str, *, key: str, title: str) -> str:
    """Makes matplotlib's SVG fit to stand in a page.

    Args:
        svg: what matplotlib wrote, drawn in the theme `PAGE`.
        key: goes before every id, so that the pictures of a page do not share any.
        title: read out by screen readers; must be escaped already.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r"font-family:[^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    for drawn, variable in _VARIABLES.items():
        svg = svg.replace(drawn, variable)
    return svg
