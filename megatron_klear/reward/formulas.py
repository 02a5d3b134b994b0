r"""Formulas of logic and of sets, `p \land (q \lor r)` and `A \cup B`, and relations joined by `and` and `or`.

math-verify reads the first as a list of their letters, and the second not at all. Here two formulas are equal if their
truth tables are: every formula in a few letters has one, so that the verdict is certain either way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from megatron_klear.reward.conditions import has_inequality, parts_of_condition
from megatron_klear.reward.latex import UPRIGHT
from megatron_klear.reward.shape import is_name, sides, without_sizes
from megatron_klear.reward.spelling import without_wrappers

MOST_LETTERS = 8
"""Letters or relations of one formula; a table has two to their number of lines."""
_DEEPEST = 32

Tree = str | tuple[str, tuple["Tree", ...]]
"""A letter (empty for the empty set), a relation, or a connective and what it joins; `not` joins one."""

Levels = tuple[tuple[str, ...], ...]
"""Connectives by how they bind, the weakest first."""


class Formula(NamedTuple):
    """A formula, its letters or relations as they first occur, and whether it has signs of logic or of sets."""

    tree: Tree
    letters: tuple[str, ...]
    has_signs: bool


class _UnclearError(Exception):
    """A text is no formula, or its brackets leave open how it is meant."""


_OPERATORS = {
    "or": r"\\(?:lor|vee)(?![A-Za-z])|\u2228",
    "and": r"\\(?:land|wedge)(?![A-Za-z])|\u2227",
    "xor": r"\\oplus(?![A-Za-z])|\u2295",
    "if": r"\\(?:to|implies|(?:long)?rightarrow|(?:Long)?[Rr]ightarrow)(?![A-Za-z])|\u2192|\u21d2",
    "same": r"\\(?:iff|(?:Long|long)?[Ll]eftrightarrow)(?![A-Za-z])|\u2194|\u21d4",
    "cup": r"\\cup(?![A-Za-z])|\N{UNION}",
    "cap": r"\\cap(?![A-Za-z])|\u2229",
    "without": r"\\(?:setminus|smallsetminus|backslash)(?![A-Za-z])|\u2216",
    "difference": r"\\(?:triangle|bigtriangleup|vartriangle|ominus)(?![A-Za-z])|\u25b3",
}
_WORDS = {
    name: rf"{UPRIGHT}\s*\{{\s*{word}\s*\}}|(?<![A-Za-z\\]){word}(?![A-Za-z])"
    for name, word in (("word_or", "or"), ("word_and", "and"), ("word_not", "not"))
}
_TOKEN = re.compile(
    "|".join(f"(?P<{name}>{pattern})" for name, pattern in (_OPERATORS | _WORDS).items())
    + r"|(?P<not>\\(?:neg|lnot)(?![A-Za-z])|\u00ac)"
    r"|(?P<bar>\\(?:overline|bar)\s*\{)|(?P<barred>\\(?:overline|bar)\s*[A-Za-z])"
    r"|(?P<complement>'|\^\s*\{?\s*(?:c(?![A-Za-z])|\\complement(?![A-Za-z])|\\prime(?![A-Za-z]))\s*\}?)"
    r"|(?P<empty>\\(?:emptyset|varnothing)(?![A-Za-z])|\u2205)"
    r"|(?P<letter>[A-Za-z](?:_\{?\d\}?)?)"
    r"|(?P<opening>[(\[{])|(?P<closing>[)\]}])|(?P<space>\s|\\[,;: ]|~)|(?P<other>.)",
    re.DOTALL,
)
_NAMES = {"word_or": "or", "word_and": "and", "word_not": "not"}
_LOGIC: Levels = (("same",), ("if",), ("or", "xor"), ("and",))  # from the weakest
_SETS: Levels = (("cup", "cap", "without", "difference"),)
_SAME_TABLE = {"cup": "or", "cap": "and", "difference": "xor"}


def formula(text: str) -> Formula | None:
    r"""A formula of logic or of sets over single letters; one letter alone is one, too. None for any other text."""
    text = without_sizes(without_wrappers(text))
    parts = sides(text)
    if len(parts) == 2 and is_name(parts[0]):
        text = parts[1]
    tokens = [(str(match.lastgroup), match.group()) for match in _TOKEN.finditer(text) if match.lastgroup != "space"]
    has_signs = any(kind in _OPERATORS for kind, _ in tokens)
    tokens = [(_NAMES.get(kind, kind), written) for kind, written in tokens]
    kinds = {kind for kind, _ in tokens}
    is_of_sets = bool(kinds & {"cup", "cap", "without", "difference", "empty"})
    if "other" in kinds or (is_of_sets and kinds & {"or", "and", "xor", "if", "same", "not"}):
        return None
    try:
        levels = _SETS if is_of_sets else _LOGIC
        tree, end = _chain(tokens, 0, levels, levels, 0)
    except _UnclearError:
        return None
    found = tuple(dict.fromkeys(_letter(written) for kind, written in tokens if kind in ("letter", "barred")))
    return Formula(tree, found, has_signs) if end == len(tokens) and len(found) <= MOST_LETTERS else None


def is_joined(tree: Tree) -> bool:
    """Whether a formula joins two things, rather than to be a letter or its complement."""
    return not isinstance(tree, str) and (tree[0] != "not" or is_joined(tree[1][0]))


def are_equal(first: Formula, second: Formula) -> bool:
    """Whether two formulas have one truth table."""
    letters = sorted({*first.letters, *second.letters})
    lines = 1 << len(letters)
    # The lines of the table in which a letter is true, as bits: every second, every second two, ...
    columns = {letter: ((1 << lines) - 1) // ((1 << (1 << i)) + 1) << (1 << i) for i, letter in enumerate(letters)}
    return _table(first.tree, columns, lines) == _table(second.tree, columns, lines)


def _letter(written: str) -> str:
    return re.sub(r"[{}\s]|\\(?:overline|bar)", "", written)


def _chain(tokens: list[tuple[str, str]], at: int, levels: Levels, whole: Levels, depth: int) -> tuple[Tree, int]:
    """What is joined at the weakest of the levels from a token on, and the token behind it; `whole` within brackets."""
    if not levels:
        return _operand(tokens, at, whole, depth)
    part, at = _chain(tokens, at, levels[1:], whole, depth)
    parts, joined = [part], set()
    while at < len(tokens) and tokens[at][0] in levels[0]:
        joined.add(tokens[at][0])
        part, at = _chain(tokens, at + 1, levels[1:], whole, depth)
        parts.append(part)
    if not joined:
        return part, at
    if len(joined) > 1 or ("if" in joined and len(parts) > 2):  # A \cup B \cap C without brackets
        raise _UnclearError
    return (joined.pop(), tuple(parts)), at


def _operand(tokens: list[tuple[str, str]], at: int, whole: Levels, depth: int) -> tuple[Tree, int]:
    nots = 0
    while at < len(tokens) and tokens[at][0] == "not":
        nots, at = nots + 1, at + 1
    if at == len(tokens) or depth > _DEEPEST:
        raise _UnclearError
    kind, written = tokens[at]
    tree: Tree
    if kind in ("letter", "barred"):
        tree, at = _letter(written), at + 1
        nots += kind == "barred"
    elif kind == "empty":
        tree, at = "", at + 1
    elif kind in ("opening", "bar"):
        tree, at = _chain(tokens, at + 1, whole, whole, depth + 1)
        if at == len(tokens) or tokens[at][0] != "closing":
            raise _UnclearError
        at += 1
        nots += kind == "bar"
    else:
        raise _UnclearError
    while at < len(tokens) and tokens[at][0] == "complement":
        nots, at = nots + 1, at + 1
    return (("not", (tree,)) if nots % 2 else tree), at


def _table(tree: Tree, columns: dict[str, int], lines: int) -> int:
    """The lines of a truth table in which a formula is true, as bits."""
    everywhere = (1 << lines) - 1
    if isinstance(tree, str):
        return columns[tree] if tree else 0
    values = [_table(part, columns, lines) for part in tree[1]]
    result, name = values[0], _SAME_TABLE.get(tree[0], tree[0])
    if name == "not":
        return everywhere ^ result
    for value in values[1:]:
        if name == "or":
            result |= value
        elif name == "and":
            result &= value
        elif name == "xor":
            result ^= value
        elif name == "same":
            result = everywhere ^ result ^ value
        elif name == "without":
            result &= everywhere ^ value
        else:
            result = everywhere ^ result | value
    return result


def relations(text: str) -> Formula | None:
    r"""Equations and inequalities joined by `and`, `or` and commas (which mean `and`); None for any other text."""
    found: list[str] = []

    def tree_of(part: str, depth: int) -> Tree:
        if depth > _DEEPEST:
            raise _UnclearError
        name, parts = parts_of_condition(part)
        if name:
            return name, tuple(tree_of(item, depth + 1) for item in parts)
        if "=" not in part and not has_inequality(part):
            raise _UnclearError
        found.append(part)
        return part

    try:
        tree = tree_of(text, 0)
    except _UnclearError:
        return None
    letters = tuple(dict.fromkeys(found))
    return Formula(tree, letters, has_signs=False) if 2 <= len(letters) <= MOST_LETTERS else None


def are_about_several(joined: Formula) -> bool:
    """Whether relations have several unknowns, so that a comma between them can only mean `and`."""
    parts = [sides(relation) for relation in joined.letters]
    if all(len(pair) == 2 for pair in parts) and len({pair[0].replace(" ", "") for pair in parts}) == 1:
        return False
    return len(frozenset().union(*map(letters_of, joined.letters))) > 1


def letters_of(relation: str) -> frozenset[str]:
    """The letters of a relation, commands aside."""
    return frozenset(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", relation)))


def with_common_relations(gold: Formula, given: Formula, are_one: Callable[[str, str], bool]) -> Formula:
    """The second formula with the relations of the first in place of those which say the same."""
    renamed = {
        relation: next((other for other in gold.letters if are_one(other, relation)), relation)
        for relation in given.letters
    }

    def rename(tree: Tree) -> Tree:
        return renamed[tree] if isinstance(tree, str) else (tree[0], tuple(map(rename, tree[1])))

    return given._replace(tree=rename(given.tree), letters=tuple(dict.fromkeys(renamed.values())))
