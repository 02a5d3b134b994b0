r"""What math-verify forgets of how an answer is written: brackets, names of values, the sides of an equation, bases.

All of it is read from the text, before any mathematics, in time linear in its length.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Brackets = Literal["set", "tuple", "list", "none"]

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\lbrack", r"\lbrace"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\rbrack", r"\rbrace"}
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])\s*")
_NAMED_AND = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*(and|or)\s*\}|(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?")
_FUNCTION_VALUE = re.compile(r"[A-Za-z]\s*\([^()]*\)")
_FUNCTION_OF = re.compile(r"[A-Za-z]\([A-Za-z]\)")
_BASES = {
    **{"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"},
    **{"ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16"},
}
_BASED = re.compile(
    r"\(?(\d[0-9A-Za-z]*)\)?\s*_\s*\{?\s*(?:(\d{1,2})|\\(?:text|mathrm)\s*\{\s*(?:base\s*)?"
    rf"({'|'.join(_BASES)}|\d{{1,2}})\s*\}})\s*\}}?"
)
_SUBSCRIPTED_NUMBER = re.compile(r"\d\s*_")
_CLOSED_INFINITY = re.compile(r"\\infty\s*\]|\[\s*-?\s*\\infty")
_COLUMN = re.compile(
    r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}"
    r"|[(\[]\s*\\begin\{(matrix|array)\}(?:\{c\})?(.*)\\end\{\3\}\s*[)\]]",
    re.DOTALL,
)
_NAMED_TUPLE = re.compile(r"\(([^()]*)\)\s*=\s*\((.*)\)", re.DOTALL)
_PERCENT = re.compile(r"(.*[^\s\\])\s*\\?%", re.DOTALL)
_SIGN_OF_TWO = re.compile(r"\\pm(?![A-Za-z])|\N{PLUS-MINUS SIGN}")
_OPPOSITE_SIGN = re.compile(r"\\mp(?![A-Za-z])|\N{MINUS-OR-PLUS SIGN}")
_OR = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])")
_POWER_OF_TEN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*)\s*10\s*\^")
EQUALITY = 1e-12
"""Share by which floats of equal numbers may differ."""
_DIGITS = re.compile(r"[0-9A-Za-z]+")
_CASES = re.compile(r"\b(?:if|otherwise|unless|when)\b")
_CLOCK = re.compile(
    r"(\d{1,2})(?::(\d{2}))?\s*(?:\\(?:text|textrm|mathrm)\s*\{\s*)?\s*(?:\\[,; ]\s*)?([AaPp])\.?\s*[Mm]\.?\s*\}?"
)
_TIME = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}")
_ZERO = re.compile(r"0+(?:\.0*)?")
_DIRECTION = re.compile(
    r"(?<![A-Za-z\\])(?:north|south|east|west|northeast|northwest|southeast|southwest|left|right|upwards?|downwards?|up"
    r"|down|clockwise|counterclockwise|anticlockwise|loss|gain|profit|increase|decrease)(?![A-Za-z])",
    re.IGNORECASE,
)
_DECIMAL = re.compile(r"\d\.(\d+)(?![\d.])")
_CONGRUENCE = re.compile(
    r"(?:([A-Za-z](?:_\{?\w+\}?)?)\s*\\equiv\s*)?(-?\d{1,30})\s*(?:\\[,; ]\s*|\\quad\s*)?"
    r"(?:\\pmod\s*\{?|\(\s*\\(?:bmod|mod|text\{mod\}|mathrm\{mod\})\s*|\\(?:bmod|mod)\s*)\s*(\d{1,30})\s*[})]?"
)
_OPERATOR_NAME = re.compile(
    r"(\\(?:max|min|sup|inf|deg|dim)(?![A-Za-z])\s*(?:[A-Za-z](?:_\w)?(?:\s*\(\s*[A-Za-z]\s*\))?)?"
    r"|\\sum(?![A-Za-z])\s*[A-Za-z](?:_\w|_\{\w\})?)\s*=\s*([^=]+)"
)
_OPEN_LOG = re.compile(r"\\log(?![A-Za-z])(?!\s*_)")
_NATURAL_LOG = re.compile(r"\\(?:ln|lg)(?![A-Za-z])")
_SPACE_AT_LETTER = re.compile(r"(?<=\d)(?:\s|~|\\[,;: ])+(?=[A-Za-z\\])")
_BARE_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?")


class Clock(NamedTuple):
    """A time of day; `half` is a or p, or empty when the text does not say."""

    hour: int
    minute: int
    half: str


class Congruence(NamedTuple):
    """What is congruent (empty when the text does not say), to which residue, for which modulus."""

    what: str
    residue: int
    modulus: int

    def agrees_with(self, other: Congruence) -> bool:
        """Whether both say the same; a name that one of them leaves out is forgiven."""
        same = self.what == other.what or not self.what or not other.what
        return same and self.modulus == other.modulus > 0 and (self.residue - other.residue) % self.modulus == 0


def without_sizes(text: str) -> str:
    r"""Without `\left`, `\right` and their like, which change nothing but the looks."""
    return _SIZES.sub("", text)


def split_at(text: str, mark: str) -> list[str]:
    """The parts of a text between marks (one character) that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        word = token.group()
        depth += (word in _OPENING) - (word in _CLOSING)
        if word == mark and depth <= 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in [*parts, text[start:]]]


def items(text: str) -> list[str]:
    """The parts of a list that stands in no brackets; `and` and `or` part them, too."""
    return [part for part in split_at(_NAMED_AND.sub(",", without_sizes(text)), ",") if part]


def brackets(text: str) -> Brackets:
    r"""How several values are held together, or that there is one only.

    `\{1,2\}` is a set, `(1,2)` (which may be an interval) and `[1,2,3]` are tuples, `1,2` is a list.
    """
    text = without_sizes(text).strip()
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("[", "]")):
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and is_balanced(inner):
            count = len(split_at(inner, ","))
            kind: Brackets = "set" if opening == r"\{" else "tuple"
            return kind if count > (2 if opening == "[" else 1) else "none"
    return "list" if len(items(text)) > 1 else "none"


def is_balanced(text: str) -> bool:
    """Whether no bracket of a text closes what was opened before it, and none stays open."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token.group() in _OPENING) - (token.group() in _CLOSING)
        if depth < 0:
            return False
    return depth == 0


def named_values(text: str) -> dict[str, str] | None:
    """`x=2, y=3` as names and values, in the order written; None unless all parts have names, and different ones."""
    parts = [split_at(part, "=") for part in items(text)]
    together = _NAMED_TUPLE.fullmatch(without_sizes(text).strip())
    if together and len(parts) == 1:  # (x, y) = (2, 3)
        names, values = (split_at(together.group(i), ",") for i in (1, 2))
        parts = [[name, value] for name, value in zip(names, values, strict=False)] if len(names) == len(values) else []
    if len(parts) < 2 or not all(len(part) == 2 and _NAME.fullmatch(part[0]) and part[1] for part in parts):
        return None
    found = dict(parts)
    return found if len(found) == len(parts) else None


def is_name(text: str) -> bool:
    """Whether a text is the name of a value: `x`, `x_1`."""
    return _NAME.fullmatch(text.strip()) is not None


def in_order(named: dict[str, str]) -> list[str]:
    """Values without their names: alphabetically where the names follow each other (x, y), else as written."""
    names = sorted(named)
    letters = [ord(name) for name in names if len(name) == 1]
    follow = len(letters) == len(names) and letters == list(range(letters[0], letters[0] + len(letters)))
    return [named[name] for name in (names if follow else named)]


def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of them; one when there is no equals sign."""
    return split_at(without_sizes(text), "=")


def value_of_function(text: str) -> str | None:
    """`5` of `f(3)=5`, else None."""
    parts = sides(text)
    return parts[1] if len(parts) == 2 and parts[1] and _FUNCTION_VALUE.fullmatch(parts[0]) else None


def named_by_operator(text: str) -> tuple[str, str]:
    r"""The name and the value of `\deg P = 5` or `\sum a_i = 5`; no name and the text where there is none."""
    match = _OPERATOR_NAME.fullmatch(without_sizes(text).strip(" $"))
    return (re.sub(r"[\s{}]", "", match.group(1)), match.group(2)) if match else ("", text)


def has_open_log(text: str) -> bool:
    r"""Whether a text has a `\log` without a base, which may be the natural one, and none that is written as such."""
    return _OPEN_LOG.search(text) is not None and _NATURAL_LOG.search(text) is None


def with_natural_log(text: str) -> str:
    r"""A text with `\ln` for `\log` without a base."""
    return _OPEN_LOG.sub(r"\\ln", text)


def same_left_side(reference: str, answer: str) -> tuple[str, str] | None:
    """The right sides of two equations with one left side, spaces aside, or with `y` and `f(x)`; else None."""
    gold, given = sides(reference), sides(answer)
    if len(gold) != 2 or len(given) != 2:
        return None
    left = {gold[0].replace(" ", ""), given[0].replace(" ", "")}
    is_y_of = "y" in left and len(left) == 2 and all(name == "y" or _FUNCTION_OF.fullmatch(name) for name in left)
    return (gold[1], given[1]) if len(left) == 1 or is_y_of else None


def are_of_different_functions(reference: str, answer: str) -> bool:
    """Whether two texts say what two functions are, or one at two places."""
    left = [parts[0].replace(" ", "") for parts in (sides(reference), sides(answer)) if len(parts) == 2]
    return len(left) == 2 and left[0] != left[1] and all(map(_FUNCTION_VALUE.fullmatch, left))


def has_cases(text: str) -> bool:
    """Whether a text says several things for several cases."""
    return _CASES.search(text) is not None or r"\begin{cases}" in text


def same_in_base(reference: str, answer: str) -> bool | None:
    """Whether both are one number in the base that the reference names, or in ten; None where neither names one.

    An answer without a base is read in that of the reference, as a missing unit is: the problem has named it.
    """
    gold, given = _BASED.fullmatch(reference.strip()), _BASED.fullmatch(answer.strip())
    if gold is None and given is None:
        is_subscripted = _SUBSCRIPTED_NUMBER.search(answer) and not _SUBSCRIPTED_NUMBER.search(reference)
        return False if is_subscripted else None
    base = _base(gold) if gold else 10
    digits = [match.group(1) if match else text.strip() for match, text in ((gold, reference), (given, answer))]
    if not 2 <= base <= 36 or (given and _base(given) != base) or not all(map(_DIGITS.fullmatch, digits)):
        return False
    try:
        return int(digits[0], base) == int(digits[1], base)
    except ValueError:
        return False


def _base(match: re.Match[str]) -> int:
    return int(match.group(2) or _BASES.get(match.group(3), match.group(3)))


def clock(text: str, *, needs_half: bool = True) -> Clock | None:
    """A time of day such as `3:30 PM`, else None; without `needs_half` `3:30`, too."""
    text = text.strip()
    match = _CLOCK.fullmatch(text)
    if match:
        return Clock(int(match.group(1)), int(match.group(2) or 0), match.group(3).lower())
    bare = None if needs_half else _BARE_CLOCK.fullmatch(text)
    return Clock(int(bare.group(1)), int(bare.group(2) or 0), "") if bare else None


def ratio(text: str) -> list[str]:
    """The terms of a ratio `3:4:5`, those behind the last equals sign; one where there is no colon."""
    return split_at(sides(text)[-1], ":")


def are_named_otherwise(reference: str, answer: str) -> bool:
    """Whether two ratios say what their terms are, and say different things: a:b = 1:2 and b:a = 1:2."""
    gold, given = sides(reference)[:-1], sides(answer)[:-1]
    return bool(gold and given) and gold[-1].replace(" ", "") != given[-1].replace(" ", "")


def are_spelled_alike(reference: str, answer: str) -> bool:
    """Whether two texts are one, spaces between a digit and a letter aside."""
    first, second = (_SPACE_AT_LETTER.sub("", text.strip()) for text in (reference, answer))
    return first == second


def time_of_day(text: str) -> tuple[int, ...]:
    """Hours and minutes, and seconds if given, of `2:30`, `1:02:30` or `2:30 PM`; empty for what is no time.

    As ratios some times that differ would be equal: 2:30 and 1:15.
    """
    time = clock(text)
    if time is not None:
        return time[:2]
    return tuple(map(int, text.strip().split(":"))) if _TIME.fullmatch(text.strip()) else ()


def has_zero(terms: list[str]) -> bool:
    """Whether a ratio has the number 0 among its terms."""
    return len(terms) > 1 and any(_ZERO.fullmatch(term) for term in terms)


def has_ellipsis(text: str) -> bool:
    r"""Whether a list goes on: `1, 2, 3,\ldots`, as `normalize_expression` writes it."""
    return ",\\ldots" in without_sizes(text)


def directions(text: str) -> frozenset[str]:
    """Words of a text that turn a value into its opposite: 5 m to the left, a loss of 5 dollars."""
    found = {word.casefold() for word in _DIRECTION.findall(text)}
    return frozenset("counterclockwise" if word == "anticlockwise" else word.removesuffix("s") for word in found)


def rounding(text: str) -> float:
    """Half a unit in the last place of a decimal, which may have been rounded; 0 for what is none."""
    match = _DECIMAL.search(text)
    return 0.5000001 * 10.0 ** -len(match.group(1)) if match else 0.0


def last_place(text: str, size: float) -> float:
    """How far a number of a size may be from the rounded one that a text shows: half a unit in its last place."""
    scientific = _POWER_OF_TEN.search(text)
    if scientific:
        mantissa = float(scientific.group(1))
        return size * (rounding(scientific.group(1)) or 0.5) / mantissa if mantissa else 0.0
    return (rounding(text) or 0.5000001) + EQUALITY * size


def congruence(text: str) -> Congruence | None:
    r"""Residue and modulus of `n \equiv 1 \pmod 3` or `1 \pmod 3`, else None."""
    match = _CONGRUENCE.fullmatch(text.strip())
    return Congruence((match[1] or "").replace(" ", ""), int(match[2]), int(match[3])) if match else None


def are_of_other_ends(reference: str, answer: str) -> bool:
    """Whether two pairs differ in their brackets: `(3, 1)`, a point or an open interval, and `[3, 1]`."""
    ends = []
    for text in (without_sizes(reference).strip(), without_sizes(answer).strip()):
        is_pair = text[:1] in ("(", "[") and text[-1:] in (")", "]") and is_balanced(text[1:-1])
        ends.append(text[0] + text[-1] if is_pair and len(split_at(text[1:-1], ",")) == 2 else "")
    return bool(ends[0] and ends[1]) and ends[0] != ends[1]


def is_closed_at_infinity(text: str) -> bool:
    """Whether a text has an interval that includes infinity."""
    return _CLOSED_INFINITY.search(without_sizes(text)) is not None


def percentage(text: str) -> str | None:
    """`25` of `25\\%`, else None; lists are left alone."""
    match = _PERCENT.fullmatch(text.strip())
    return match.group(1) if match and len(items(text)) == 1 and "%" not in match.group(1) else None


def column(text: str) -> str | None:
    """A column vector as a tuple, else None."""
    match = _COLUMN.fullmatch(without_sizes(text).strip())
    rows = [] if match is None else [row.strip() for row in (match.group(2) or match.group(4) or "").split(r"\\")]
    rows = rows[:-1] if rows and not rows[-1] else rows
    return f"({', '.join(rows)})" if len(rows) > 1 and not any("&" in row for row in rows) else None


def both_signs(text: str) -> str:
    r"""`1 \pm 2` as `1 +2 \text{ or } 1 -2`; sets and values of several names or signs are left alone."""
    parts = items(text)
    names = {tuple(split_at(part, "=")[:-1]) for part in parts}
    if len(parts) > 1 and len(names) == 1 and _SIGN_OF_TWO.search(text):
        # Lists of tuples, too: (1, \pm 2) has its sign within brackets.
        return text if any(part[:1] in "([" for part in parts) else ", ".join(map(both_signs, parts))
    if len(_SIGN_OF_TWO.findall(text)) != 1 or len(_OPPOSITE_SIGN.findall(text)) > 1 or r"\{" in text:
        return text
    if len(items(text)) != 1:
        return text
    plus, minus = (_OPPOSITE_SIGN.sub(other, _SIGN_OF_TWO.sub(sign, text)) for sign, other in (("+", "-"), ("-", "+")))
    return rf"{plus} \text{{ or }} {minus}"


def are_alternatives(text: str) -> bool:
    """Whether a text has several values for one thing: `2 or 3`, `x=2, x=3`."""
    parts = items(text)
    names = {tuple(split_at(part, "=")[:-1]) for part in parts}
    return len(parts) > 1 and (_OR.search(text) is not None or (len(names) == 1 and names != {()}))


def are_single_alternatives(text: str) -> bool:
    """Whether a text has several values for one thing, none of which is a tuple."""
    return are_alternatives(text) and "tuple" not in map(brackets, items(text))
