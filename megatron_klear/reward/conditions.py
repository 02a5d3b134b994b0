r"""Conditions on one unknown, `x < 3 \text{ or } x > 5`, as sets: math-verify forgets how they are joined."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_klear.reward.latex import UPRIGHT
from megatron_klear.reward.shape import is_balanced, split_at, without_sizes

_INEQUALITY = re.compile(r"<|>|\\[gl]eq?(?![A-Za-z])|\\[gl]eqslant(?![A-Za-z])|[\u2264\u2265]")
_OR, _AND = "\x01", "\x02"
_WORDS = (
    (re.compile(rf"{UPRIGHT}\s*\{{\s*,?\s*or\s*\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])"), _OR),
    (
        re.compile(rf"{UPRIGHT}\s*\{{\s*,?\s*and\s*\}}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![A-Za-z])"),
        _AND,
    ),
)


class Solutions(NamedTuple):
    """The unknown (empty for a set that is written without one) and the set of its values."""

    name: str
    values: Any


def has_inequality(text: str) -> bool:
    """Whether a text has a sign of inequality."""
    return _INEQUALITY.search(text) is not None


def connectives(text: str) -> frozenset[str]:
    """How the inequalities of a text are joined: `or`, `and` and `,`; empty unless there are two at least."""
    if len(_INEQUALITY.findall(text)) < 2:
        return frozenset()
    text = _marked(text)
    found = {name for name, mark in (("or", _OR), ("and", _AND)) if mark in text}
    if len(split_at(text, ",")) > 1:
        found.add(",")
    return frozenset(found)


def has_or(text: str) -> bool:
    """Whether a text says `or`."""
    return _OR in _marked(text)


def parts_of_condition(text: str) -> tuple[str, list[str]]:
    """How a condition is joined, `or` or `and`, by the weaker of both, and its parts; empty for one relation.

    A comma is `and`, and binds most. Brackets around the whole are dropped if anything is joined within.
    """
    text = _marked(text).strip()
    inner = text[1:-1]
    if text[:1] == "(" and text[-1:] == ")" and (_OR in inner or _AND in inner) and is_balanced(inner):
        text = inner.strip()
    for mark, name in ((_OR, "or"), (_AND, "and"), (",", "and")):
        parts = split_at(text, mark)
        if len(parts) > 1:
            return name, parts
    return "", [text]


def solutions(text: str, read: Callable[[str], Any], sympy: Any) -> Solutions | None:
    """The values that fulfil a condition; None where that is not plain, as with two unknowns.

    Args:
        text: a condition, or a set of numbers.
        read: the parser; None for what it cannot read.
        sympy: the module.
    """
    try:
        found = _solutions(_marked(text), read, sympy)
    except (RecursionError, MemoryError):
        raise
    except Exception:  # sympy solves what a model wrote: anything can come out of it
        return None
    return found


def _marked(text: str) -> str:
    text = without_sizes(text)
    for pattern, mark in _WORDS:
        text = pattern.sub(f" {mark} ", text)
    return re.sub(rf",\s*(?=[{_OR}{_AND}])", "", text)


def _solutions(text: str, read: Callable[[str], Any], sympy: Any) -> Solutions | None:
    for mark in (_OR, _AND, ","):
        parts = split_at(text, mark)
        if len(parts) < 2 or not has_inequality(text):
            continue
        found = [_solutions(part, read, sympy) for part in parts]
        known = [item for item in found if item is not None]
        if len(known) < len(found) or len({item.name for item in known}) > 1:
            return None
        sets = [item.values for item in known]
        joined, common = sympy.Union(*sets), sympy.Intersection(*sets)
        if mark == ",":  # x < 1, x > 2 can only be "or", x > 1, x < 2 only "and"
            if (common == sympy.S.EmptySet) == (joined == sympy.S.Reals):
                return None
            return Solutions(known[0].name, joined if common == sympy.S.EmptySet else common)
        return Solutions(known[0].name, joined if mark == _OR else common)
    value = read(text)
    if isinstance(value, sympy.Set) and not isinstance(value, sympy.FiniteSet):
        return Solutions("", value)
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol and isinstance(value.rhs, sympy.Set):  # x \\in [0, 1]
        return Solutions(value.lhs.name, value.rhs)
    if not isinstance(value, (sympy.core.relational.Relational, sympy.And)) or len(value.free_symbols) != 1:
        return None
    return Solutions(next(iter(value.free_symbols)).name, value.as_set())
