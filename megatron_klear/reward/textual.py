"""Answers that are no mathematics: choice letters and words."""

from __future__ import annotations

import re

from megatron_klear.reward.latex import STYLED
from megatron_klear.reward.spelling import without_wrappers

_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?")
_CHOICE_AND_TEXT = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(.*)", re.DOTALL)
_SECOND_CHOICE = re.compile(r"\([A-J]\)|\b[A-J]\b")
_WORDS = re.compile(r"[A-Za-z]+(?:[ '\-]+[A-Za-z]+)*")
_CAPITALIZED = re.compile(r"[A-Z][a-z]{1,2}|[A-Z]{3,}")
_NO_SOLUTION = re.compile(r"(?:there (?:is|are) )?no (real |integer )?(?:solutions?)(?: exists?)?", re.IGNORECASE)
_EMPTY_SET = re.compile(r"\\(?:emptyset|varnothing)|\u2205|\\\{\s*\\\}")
_ARTICLE = re.compile(r"^(?:an?|the) ")
_INNER_CAPITAL = re.compile(r"[a-z][A-Z]")
_SHORT_WORDS = frozenset(
    {
        *(
            "all",
            "any",
            "am",
            "pm",
            "yes",
            "no",
            "not",
            "nor",
            "or",
            "on",
            "up",
            "odd",
            "old",
            "low",
            "hot",
            "wet",
            "top",
        ),
        *("one", "two", "six", "ten", "ii", "iii", "iv", "vi", "vii", "ix", "sum", "tie", "win", "dna", "dne"),
        *("mon", "tue", "wed", "thu", "fri", "sat", "sun", "day", "red", "sea"),
        *("boy", "man", "men", "son", "dad", "mom", "cat", "cow", "dog", "hen"),
    }
)
_NAMES_OF_MATHEMATICS = frozenset(
    {
        *("infinity", "infty", "infinite", "oo", "emptyset", "varnothing", "degree", "degrees"),
        *("sqrt", "cbrt", "root", "exp", "log", "ln", "lg", "abs", "gcd", "lcm", "max", "min", "mod", "det"),
        *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth"),
        *("arcsin", "arccos", "arctan", "asin", "acos", "atan"),
        *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "xi", "pi"),
        *("rho", "sigma", "tau", "phi", "psi", "omega"),
    }
)


_LETTER = r"(?:\( ?[A-J] ?\)|[A-J]\b)"
_CHOICES = re.compile(rf"{_LETTER}(?: ?(?:,(?: ?and\b)?|;|&|\band\b) ?{_LETTER})+|(?:\([A-J]\) ?){{2,}}")
_JOINED_CHOICES = re.compile(r"[A-J]{2,}")
_BETWEEN_WORDS = re.compile(r"\s*(?:,\s*and\b|,|;|&|\band\b)\s*")
_LISTED_WORD = re.compile(r"[A-Za-z]{4,}|[A-Z][a-z]+|[IVX]{2,}")
_VERDICTS = frozenset({"yes", "no", "true", "false"})
_NUMERAL = re.compile(r"[IVX]+")
_STATEMENTS = re.compile(r"(?:(?i:statements?) )?[IVX]{1,5}(?: ?(?:, ?and\b|,|;|&|\band\b) ?[IVX]{1,5})*(?: only)?")
_ALL = r"(?:(?:the )?set of )?(?:all|any|every|the)(?: of)?(?: the)?"
_SETS_IN_WORDS = (
    (r"\mathbb{R}", re.compile(rf"{_ALL} reals?(?: numbers?| values)?")),
    (r"\mathbb{Z}", re.compile(rf"{_ALL} integers?")),
    (r"\infty", re.compile(r"infinitely many(?: solutions?| values)?|infinity")),
)
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


def _plain(text: str) -> str:
    r"""Text without `\text{}`-like commands and with single spaces."""
    text = STYLED.sub(r"\1", without_wrappers(text)).replace(r"\ ", " ").replace("~", " ").replace("**", "")
    return " ".join(text.split()).rstrip(".")


def choice_letter(text: str, *, with_text: bool = False) -> str | None:
    """The letter of a multiple-choice answer: `C`, `(C)`, and with `with_text` also `(C) 5` or `C. 5`.

    A text that names a second letter is not a choice, so that listing all of them earns nothing.
    """
    plain = _plain(text)
    match = _CHOICE.fullmatch(plain)
    if match:
        return match.group(1)
    match = _CHOICE_AND_TEXT.fullmatch(plain) if with_text else None
    if match and not _SECOND_CHOICE.search(match.group(3)):
        return match.group(1) or match.group(2)
    return None


def words(text: str) -> str | None:
    """The words of a textual answer in lower case, or None if it may be mathematics.

    math-verify reads an unmarked word as a product of letters, so anagrams would be equal. Runs of up to three
    letters stay mathematics (`abc`, `xy`), unless they are marked as text, begin with a capital (`Amy`), are capitals
    (`BAC`, the order of three), or are among the short words that answers are made of (`no`).
    """
    plain = _plain(text)
    if not _WORDS.fullmatch(plain):
        return None
    longest = max(map(len, re.findall(r"[A-Za-z]+", plain)))
    is_word = _CAPITALIZED.fullmatch(plain) or plain.casefold() in _SHORT_WORDS
    is_marked = longest > 1 and STYLED.fullmatch(without_wrappers(text))
    return plain.casefold() if longest > 3 or is_word or is_marked else None


def same_words(reference: str, answer: str) -> bool:
    """Whether two texts that are words are the same; small and capital letters differ only in `AaBb` and its like."""
    gold, given = _plain(reference), _plain(answer)
    if _INNER_CAPITAL.search(gold) or _INNER_CAPITAL.search(given):
        return gold == given
    return _ARTICLE.sub("", gold.casefold()) == _ARTICLE.sub("", given.casefold())


def is_phrase(phrase: str) -> bool:
    """Whether the result of `words` has no name that is mathematics in itself, as in `infinity` and `arctan x`.

    Four letters may be a product: `abcd`.
    """
    found = re.findall(r"[a-z]+", phrase)
    return len(phrase) != 4 and not any(word in _NAMES_OF_MATHEMATICS or len(word) == 1 for word in found)


def choice_letters(text: str) -> str:
    """The letters of several choices, `A, C` or `(A)(C)`, in order and joined; empty for what is no such list."""
    plain = _plain(text)
    return "".join(re.findall(r"[A-J]", plain)) if _CHOICES.fullmatch(plain) else ""


def same_choices(reference: str, answer: str) -> bool | None:
    """Whether two lists of choices are the same; `ABD` may be one, too, if the other is. None for what are none."""
    gold, given = choice_letters(reference), choice_letters(answer)
    if not gold and not given:
        return None
    joined = [_plain(text) for text in (reference, answer)]
    gold, given = (
        letters or (text if _JOINED_CHOICES.fullmatch(text) else "")
        for letters, text in zip((gold, given), joined, strict=True)
    )
    return sorted(gold) == sorted(given) if gold and given else None


def word_list(text: str) -> tuple[str, ...]:
    """The words or phrases of a list, small: `Alice, Bob, and Carol`; empty for what is none, or mathematics."""
    plain = _plain(re.sub(r"\\quad|\\,", " ", text))
    parts = _BETWEEN_WORDS.split(plain)
    if len(parts) < 2 or not all(_WORDS.fullmatch(part) for part in parts):
        return ()
    names = _NAMES_OF_MATHEMATICS.intersection(re.findall(r"[a-z]+", plain.casefold()))
    if names or not any(_LISTED_WORD.search(part) for part in parts):
        return ()
    return tuple(part.casefold() for part in parts)


def says_verdict(reference: str, answer: str) -> bool:
    """Whether an answer begins with the reference, yes, no, true or false, and goes on without another of them."""
    gold, parts = _plain(reference).casefold(), word_list(answer)
    if gold not in _VERDICTS or not parts or parts[0] != gold:
        return False
    return not _VERDICTS.intersection(re.findall(r"[a-z]+", " ".join(parts[1:])))


def set_in_words(text: str) -> str | None:
    r"""`\mathbb{R}` of `all real numbers`, and its like; None for other texts."""
    plain = _plain(text).casefold()
    return next((written for written, pattern in _SETS_IN_WORDS if pattern.fullmatch(plain)), None)


def same_text(reference: str, answer: str) -> bool:
    r"""Whether two texts are one, commands for text aside: `\text{AB}` and `AB`."""
    return _plain(reference) == _plain(answer)


def same_statements(reference: str, answer: str) -> bool | None:
    """Whether two lists of Roman numerals are the same, `I, III` and `III and I only`; None unless both are some.

    A numeral alone may be a name: one of both must be a list, or say `only`.
    """
    plain = [_plain(re.sub(r"\\q?quad|\\,", " ", text)) for text in (reference, answer)]
    if not all(map(_STATEMENTS.fullmatch, plain)):
        return None
    gold, given = (sorted(_NUMERAL.findall(text)) for text in plain)
    is_list = max(len(gold), len(given)) > 1 or any(text.endswith("only") for text in plain)
    return gold == given if is_list else None


def number_in_words(text: str) -> str | None:
    """Digits of a number in words up to twenty, else None."""
    plain = _plain(text).casefold()
    return str(_NUMBERS.index(plain)) if plain in _NUMBERS else None


def are_both_without_solution(first: str, second: str) -> bool:
    """Whether two texts say that there is no solution, one at least in words; the other may be the empty set."""
    found = [_NO_SOLUTION.fullmatch(_plain(text)) for text in (first, second)]
    if all(found):
        return len({(match[1] or "").casefold() for match in found if match}) == 1
    empty = [_EMPTY_SET.fullmatch(_plain(text)) for text in (first, second)]
    return any(found) and any(empty)
