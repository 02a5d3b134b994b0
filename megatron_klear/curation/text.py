"""Words and n-grams of a text: the normalisation that overlaps are looked for in.

A text is taken in Unicode's compatibility form (NFKC) without regard to case. Its words are the longest runs of letters
and digits; everything else, punctuation and underscores included, only separates. Scripts that are written
without spaces (Han, Hiragana, Katakana) give one word per character.
"""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The normalised words of a text, in order."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _WORD.findall(plain.casefold())


def ngrams(of: list[str], n: int) -> list[str]:
    """Every n words in a row, joined by spaces; empty for shorter texts."""
    return [" ".join(of[i : i + n]) for i in range(len(of) - n + 1)]
