r"""Commands of LaTeX that mark text: what several rooms look for in an answer."""

from __future__ import annotations

import re

UPRIGHT = r"\\(?:text|textrm|mathrm|mbox|operatorname)"
"""A command for upright text, as units and words stand in."""
STYLE = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|boldsymbol|mbox|operatorname)"
"""Those, and the ones for bold and slanted text."""
STYLED = re.compile(rf"{STYLE}\s*\{{([^{{}}]*)\}}")
"""Marked text without braces in it; group 1 is the text."""
