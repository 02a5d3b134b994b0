r"""What is said beside a value: text that the parser drops, the set of a parameter, approximations, sums to be done.

Text behind a number is taken for a unit and dropped, so that `5\text{ or 6}`, `5\text{ squared}` and
`5\text{ and a half}` would all be 5.
"""

from __future__ import annotations

import re

from megatron_klear.reward.latex import STYLED

THAT_IS = re.compile(r"\(\s*i\.e\.(?:[^()]++|\([^()]*+\))*+\)")
"""A remark that explains a value: `100 (i.e., all values)`."""
_CONJUNCTION = re.compile(r"[\s,;.]*(?:and|or)?[\s,;.]*")
_NUMBER_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion"
)
_OTHER_VALUE = re.compile(
    rf"\b(?:or|nor|not|but|except|maybe|perhaps|possibly|probably|{_NUMBER_WORDS})\b"
    r"|\band\s+(?:an?\b|half\b|quarter\b|third\b)"
    # digits, but those of cm2, m^2, s^{-1} and H_2O
    r"|(?<![A-Za-z\d.^_{\-])\d|(?<=\s)-\d|^-\d"
    r"|\u2030|\bper\s*mille\b|\bpp[mb]\b|\bbasis points?\b",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"\s*(?:,?\s*and\s+\S+|squared|cubed|factorial|plus|minus|over|times\s+\S|divided|to\s+the\s+(?!(?:left|right|north|south|east|west)\b)"
    r"|hal(?:f|ves)|thirds?|quarters?\s+of|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?"
    r"|thousandths?|th\s+\S|\\?pi|\u03c0)\b",
    re.IGNORECASE,
)
_LETTER_OF_NO_UNIT = re.compile(r"\s*([efijknopqrvwxyz])\s*")
_DOMAIN = re.compile(
    r"(?<![\s,;(])(?<!\\[:!])"  # from the first of its signs only, or thousands of them take seconds
    r"(?:\s|\\[,;:! ]|\\q?quad(?![A-Za-z])|[,;(]|\\(?:text|mbox)\s*\{\s*,?\s*(?:for|where|with|and)?"
    r"(?:\s+(?:all|any|some|every))?(?:\s+integers?)?\s*\}|\\forall(?![A-Za-z]))+"
    r"(?P<name>[a-z])\s*\\in\s*(?:\\mathbb\s*\{?\s*(?P<set>[A-Z])\s*\}?|(?P<plain>[\u2124\u2115\u211d\u211a]))"
    r"(?P<part>(?:_\s*\{?[^{}\s]*\}?|\^\s*\{?[^{}\s]*\}?)?)[\s)]*"
)
_FOR_INTEGERS = re.compile(
    r"(?:[\s,;(]|\\q?quad(?![A-Za-z]))*\\(?:text|mbox)\s*\{\s*,?\s*(?:for|where|with)\s+(?:(?:all|any|some|every|an)\s+)?integers?"
    r"\s*(?:\}\s*(?P<name>[a-z])|(?P<inside>[a-z])\s*\})[\s)]*"
)
_SET_SIGNS = {"\u2124": "Z", "\u2115": "N", "\u211d": "R", "\u211a": "Q"}
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])|\u2248")
MOST_FORMS = 3
"""Forms of one value that are compared."""
_EQUIVALENTLY = re.compile(
    r",?\s?(?:\\(?:text|mbox)\s?\{\s?,?\s?or,? equivalently,?\s?\}|\bor,? equivalently\b),?", re.IGNORECASE
)
_TO_BE_DONE = re.compile(
    r"\\(?:sum|prod|i{0,2}int|oint|lim|limits|[bp]?mod)(?![A-Za-z])|\\d?frac\s*\{\s*d\s*\}\s*\{\s*d"
)


def changing_words(text: str) -> frozenset[str]:
    r"""Texts beside a value which make it another: `or 6`, `squared`, `and a half`; units and names do not.

    `\text{or}` between two values is no remark but parts a list.
    """
    found = set()
    for match in STYLED.finditer(text):
        words = match.group(1).replace("\\ ", " ")
        if _CONJUNCTION.fullmatch(words):
            continue
        before = text[: match.start()].rstrip(" {")
        if before.endswith("_"):
            continue  # the base of a number
        is_behind = bool(before)
        if (is_behind and _OPERATION.match(words)) or _OTHER_VALUE.search(words):
            found.add(" ".join(words.casefold().split()))
    return frozenset(found)


def explanations(text: str) -> frozenset[str]:
    """Remarks such as `(i.e., 6)` that name a number, which may be another value."""
    found = (re.sub(r"\s", "", match.group()) for match in THAT_IS.finditer(text))
    return frozenset(remark for remark in found if any(map(str.isdigit, remark)))


def with_plain_letters(text: str) -> str:
    r"""`5\mathrm{x}` as `5x`: a letter that names no unit is a factor."""

    def plain(match: re.Match[str]) -> str:
        letter = _LETTER_OF_NO_UNIT.fullmatch(match.group(1))
        return f" {letter.group(1)} " if letter else match.group()

    return STYLED.sub(plain, text)


def split_domain(text: str) -> tuple[str, str, str]:
    r"""`2\pi k, k \in \mathbb{Z}` as the expression, the parameter and the set; the latter empty when there is none."""
    spoken = _FOR_INTEGERS.search(text)
    if spoken and spoken.end() == len(text) and spoken.start():
        return text[: spoken.start()], spoken["name"] or spoken["inside"], "Z"
    matches = list(_DOMAIN.finditer(text))
    if len(matches) != 1 or matches[0].end() != len(text) or not text[: matches[0].start()].strip():
        return text, "", ""
    match = matches[0]
    domain = (match["set"] or _SET_SIGNS[match["plain"]]) + re.sub(r"[\s{}]", "", match["part"])
    return text[: match.start()].rstrip(" ,;"), match["name"], domain


def rename_letter(text: str, old: str, new: str) -> str:
    """A text with one letter for another, where it stands alone."""
    return re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, text)


def approximations(text: str) -> list[str]:
    r"""The sides of `\frac{22}{7} \approx 3.14`; one where nothing is approximate."""
    return [part.strip() for part in _APPROXIMATELY.split(text)]


def equivalents(text: str) -> list[str]:
    """The forms of `sum_(i=1)^n i, or equivalently n(n+1)/2`; one where a text gives no other."""
    return [part.strip() for part in _EQUIVALENTLY.split(text, maxsplit=MOST_FORMS - 1)]


def is_to_be_done(text: str) -> bool:
    """Whether a text names a sum, product, limit, derivative, integral or residue, perhaps only the question."""
    return _TO_BE_DONE.search(text) is not None
