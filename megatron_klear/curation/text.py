"""Words and n-grams of a text: the normalisation that overlaps are looked for in.

Characters that nobody sees are dropped first: zero-width spaces, soft hyphens and all others of the category Cf,
variation selectors and fillers. The zero-width joiner and non-joiner are among them: they change how letters of one
word are drawn and end no word. The text is then taken in Unicode's compatibility form (NFKC) without regard to case.
Combining marks that belong to no script (as in x-bar, or a line struck through a letter) and the points of Hebrew,
Arabic and Syriac, which texts have or leave out, are dropped, and so are marks beyond U+FFFF. Other marks are part of
the letter before them, as the vowels of Hindi are. Words are the longest runs of letters and digits; everything else
only separates.

Scripts that are written without spaces give one item per letter, its marks included, and so many letters count as one
word as words of running text have on average:

    Han 1.5    Hiragana, Katakana 2    Myanmar 2    Thai, Lao, Khmer, Tai scripts 3

An n-gram is then the shortest run of items that comes to n words: nine words are 14 Chinese, 18 Burmese or 27 Thai
letters. Averages measured over the first article of the Declaration of Human Rights and some exercises, cut into words
by ICU's dictionaries: Chinese 1.6, Japanese 1.7 (of both kinds of letters), Burmese 2.2, Lao 2.9, Khmer 3.2, Thai 3.3.
Nine letters are too few: in Thai they are the phrase "find the value of", which any two exercises may share.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata

UNITS_PER_WORD = 6
"""What fractions of a word are counted in."""

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"
_MYANMAR = "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"
_THAI_AND_OTHERS = "\u0e00-\u0eff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"
_UNITS = {_HAN: 4, _KANA: 3, _MYANMAR: 3, _THAI_AND_OTHERS: 2}
_UNSPACED = "".join(_UNITS)
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
_UNITS_OF = tuple((re.compile(f"[{letters}]"), units) for letters, units in _UNITS.items())

_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
_OPTIONAL_MARKS = (
    (0x0300, 0x0370), (0x0483, 0x0488), (0x0591, 0x05C8), (0x0610, 0x061B), (0x064B, 0x0660), (0x0670, 0x0671),
    (0x06D6, 0x06EE), (0x0711, 0x0712), (0x0730, 0x074B), (0x0898, 0x0900), (0x1AB0, 0x1B00), (0x1DC0, 0x1E00),
    (0x20D0, 0x2100), (0x3099, 0x309B), (0xFE20, 0xFE30),
)  # fmt: skip


_CATEGORIES = {
    code: category
    for code in range(0x80, sys.maxunicode + 1)
    if (category := unicodedata.category(chr(code))) in ("Cf", "Mn", "Mc", "Me")
}
_UNSEEN = dict.fromkeys(
    [
        *(code for code, category in _CATEGORIES.items() if category == "Cf"),
        *map(ord, _FILLERS),
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    ]
)
_OPTIONAL = {
    ord("_"): " ",
    **dict.fromkeys(code for code, category in _CATEGORIES.items() if category == "Me"),
    **dict.fromkeys(code for code in _CATEGORIES if any(first <= code < end for first, end in _OPTIONAL_MARKS)),
    **dict.fromkeys(code for code in _CATEGORIES if code > 0xFFFF),  # of rare scripts; they would make matching slow
}
_MARKS = "".join(map(chr, sorted(_CATEGORIES.keys() - _OPTIONAL.keys() - _UNSEEN.keys())))
_ALL_MARKS = frozenset(chr(code) for code, category in _CATEGORIES.items() if category != "Cf")
_ASCII_WORD = re.compile(r"[^\W_]+")
_LETTER_OR_PLAIN_WORD = re.compile(rf"(?![\W_])[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_WORD = re.compile(rf"\w[\w{_MARKS}]*")
_LETTER_OR_WORD = re.compile(rf"(?!\W)[{_UNSPACED}][{_MARKS}]*|(?:(?![{_UNSPACED}])[\w{_MARKS}])+")


def seen(text: str) -> str:
    """A text without the characters that nobody sees."""
    return text if text.isascii() else text.translate(_UNSEEN)


def words(text: str) -> list[str]:
    """The normalised words of a text, in order; for scripts without spaces, its letters."""
    if text.isascii():
        return _ASCII_WORD.findall(text.casefold())
    plain = unicodedata.normalize("NFKC", seen(text)).casefold()
    if _ALL_MARKS.isdisjoint(plain):
        return _LETTER_OR_PLAIN_WORD.findall(plain)
    found: list[str] = []
    for word in _WORD.findall(plain.translate(_OPTIONAL)):
        if word.isascii() or not _UNSPACED_LETTER.search(word):
            found.append(word)
        else:
            found += _LETTER_OR_WORD.findall(word)
    return found


@functools.lru_cache(maxsize=1 << 15)
def units_of(item: str) -> int:
    """What an item of `words` counts, in parts of a word."""
    if item.isascii():
        return UNITS_PER_WORD
    return next((units for letters, units in _UNITS_OF if letters.match(item)), UNITS_PER_WORD)


def units(of: list[str]) -> int:
    """What items of `words` count together."""
    return sum(map(units_of, of))


def comes_to(of: list[str], count: int) -> bool:
    """Whether items of `words` are so many words at least."""
    return len(of) * min(_UNITS.values()) >= count * UNITS_PER_WORD or units(of) >= count * UNITS_PER_WORD


def ngrams(of: list[str], n: int) -> list[str]:
    """From every item on the shortest run that comes to n words, joined by spaces; empty for shorter texts.

    Two texts that share a run of n words or more share such a run, the one that begins where theirs does.
    """
    if "".join(of).isascii():
        return runs(of, n)
    sizes, needed = list(map(units_of, of)), n * UNITS_PER_WORD
    if sizes.count(UNITS_PER_WORD) == len(of):
        return runs(of, n)
    found, end, size = [], 0, 0
    for start in range(len(of)):
        while size < needed and end < len(of):
            size += sizes[end]
            end += 1
        if size < needed:
            break
        found.append(" ".join(of[start:end]))
        size -= sizes[start]
    return found


def runs(of: list[str], count: int) -> list[str]:
    """Every `count` items in a row, joined by spaces; empty for shorter texts."""
    return [" ".join(of[i : i + count]) for i in range(len(of) - count + 1)]
