r"""Statements of geometry, `AB \parallel CD`, which the parser cannot read: compared by what they name."""

from __future__ import annotations

import re

from megatron_klear.reward.spelling import without_wrappers

_RELATIONS = {
    "parallel": r"\\parallel(?![A-Za-z])|\u2225",
    "perpendicular": r"\\perp(?![A-Za-z])|\u22a5",
    "congruent": r"\\cong(?![A-Za-z])|\u2245",
    "similar": r"\\sim(?![A-Za-z])|\u223c",
}
_RELATION = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _RELATIONS.items()))
_LINE = re.compile(r"\\(?:overline|overleftrightarrow|bar)\s*\{\s*([A-Za-z]{1,2})\s*\}|([A-Z]{2}|[A-Za-z])|\\(ell)")
_TRIANGLE = re.compile(r"(?:\\triangle(?![A-Za-z])|\u25b3)\s*\{?\s*([A-Z]{3})\s*\}?")


def statement(text: str) -> tuple[str, frozenset[frozenset[str] | str]] | None:
    r"""What a statement on two lines, segments or triangles says, whichever way they are named; None for other texts.

    `AB \parallel CD` is `DC \parallel BA`; `\triangle ABC \cong \triangle DEF` says which corners belong together.
    """
    text = without_wrappers(text)
    signs = list(_RELATION.finditer(text))
    if len(signs) != 1:
        return None
    name = str(signs[0].lastgroup)
    both = text[: signs[0].start()].strip(), text[signs[0].end() :].strip()
    triangles = [match for side in both if (match := _TRIANGLE.fullmatch(side))]
    if len(triangles) == 2 and name in ("congruent", "similar"):
        first, second = (match.group(1) for match in triangles)
        # The corners in the order of the statement; which triangle comes first says nothing.
        there = "".join(sorted(f"{a}{b} " for a, b in zip(first, second, strict=True)))
        back = "".join(sorted(f"{b}{a} " for a, b in zip(first, second, strict=True)))
        return name, frozenset({there, back})
    lines = [match for side in both if (match := _LINE.fullmatch(side))]
    if len(lines) != 2 or name == "similar":
        return None
    return name, frozenset(frozenset(next(filter(None, match.groups()))) for match in lines)
