"""Numbers as people read them."""

from __future__ import annotations

import math


def quantity(value: float) -> str:
    """Three or four significant digits with k, M, G or T; `1234.5` is `1.23k`, `0.5` is `0.500`.

    NaN and infinity are spelled `nan`, `inf`, `-inf`.
    """
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor * 0.9995:
            return _three_digits(value / factor) + letter
    if size == 0:
        return "0"
    return _three_digits(value) if size >= 1e-3 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """A duration as `0:07`, `12:34`, `1:02:03` or `2d 03:04:05`."""
    whole = round(max(seconds, 0.0))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def byte_size(count: float) -> str:
    """Bytes in binary units: `1.50 GiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{_three_digits(size)} {unit}"


def _three_digits(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:.3f}"
