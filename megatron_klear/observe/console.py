"""Where tables are printed: as wide as a terminal, or, into a pipe or file, wide enough for all columns."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

_PLAIN_WIDTH = 240


def make_console(stream: TextIO) -> Console:
    """A console on a stream: with colours on a terminal, wide and without any elsewhere."""
    if stream.isatty():
        return Console(file=stream)
    return Console(file=stream, width=_PLAIN_WIDTH, no_color=True, highlight=False)
