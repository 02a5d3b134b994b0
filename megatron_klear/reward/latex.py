r"""Commands of LaTeX that mark text: what several rooms look for in an answer."""

from __future__ import annotations

import re

UPRIGHT = r"\\(?:text|textrm|mathrm|mbox|operatorname)"
"""A command for upright text, as units and words stand in."""
STYLE = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|boldsymbol|mbox|operatorname)"
"""Those, and the ones for bold and slanted text."""
STYLED = re.compile(rf"{STYLE}\s*\{{([^{{}}]*)\}}")
"""Marked text without braces in it; group 1 is the text."""
_SPACE = r"(?:\\[,;:! ]|~|\s)"
_LONG_SPACE = re.compile(rf"(?<!\\){_SPACE}{{3,}}")
_OUTER_SPACE = re.compile(rf"^{_SPACE}+|(?<!\\){_SPACE}{{1,2}}$")


def without_long_spaces(text: str) -> str:
    """Runs of spaces as one, and none around the text.

    Patterns that look for a value before spaces try each of them as its end, and the parser reads none before a value.
    """
    text = _LONG_SPACE.sub(lambda match: " " if match.group().isspace() else "\\ ", text)
    return _OUTER_SPACE.sub("", text)
