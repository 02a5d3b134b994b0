"""Rewriting the spellings of an expression that math-verify 0.9.0 misreads; what it reads well is left alone."""

from __future__ import annotations

import functools
import re

from megatron_klear.reward.dress import without_dress
from megatron_klear.reward.latex import STYLED
from megatron_klear.reward.numerals import write_out_numerals
from megatron_klear.reward.remarks import THAT_IS
from megatron_klear.reward.units import in_one_unit, in_plain_units, mark_abbreviation

_SYMBOLS = str.maketrans(
    {
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "\N{UNION}": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "±": r"\pm ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "°": r"^\circ ",
        "\N{MINUS SIGN}": "-",
        "\N{FRACTION SLASH}": "/",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        **{chr(ord("\N{FULLWIDTH DIGIT ZERO}") + digit): str(digit) for digit in range(10)},
    }
)
_RAISED = str.maketrans({"²": "^{2}", "³": "^{3}"})  # before units are looked for: 12 m²
_OF_LETTERS = re.compile(
    r"(?:\\(?:text|mathrm|operatorname)\s*\{\s*(?P<marked>gcd|lcm)\s*\}|\\(?P<command>gcd|lcm)(?![A-Za-z]))"
    r"\s*(?:\\left\s*)?\((?P<arguments>[^()]*[A-Za-z][^()]*?)(?:\\right\s*)?\)"
)
_ELLIPSIS = re.compile(r",\s*(?:\\(?:ldots|dots|dotsc|cdots)(?![A-Za-z])|\.\.\.|\u2026)")
_SPACED_NUMBERS = re.compile(r"[\d\s(),.\-]*")
_SPACE_BETWEEN = re.compile(r"(?<=\d)\s+(?=-?\d)")
_CURRENCIES = ((r"€|\\euro(?![A-Za-z])", "euros"), (r"£|\\pounds(?![A-Za-z])|\\textsterling(?![A-Za-z])", "sterling"))
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\log_\{?e\}?(?![A-Za-z])"), r"\\ln "),
    (re.compile(r"(?:\\left\s*)?\\langle(?![A-Za-z])"), "("),
    (re.compile(r"(?:\\right\s*)?\\rangle(?![A-Za-z])"), ")"),
    (
        re.compile(r"\^\s*(?:T(?![A-Za-z])|\{\s*T\s*\}|\{?\s*\\(?:top|intercal)(?![A-Za-z])\s*\}?)"),
        r"^{T_{r}}",
    ),  # dropped
    (re.compile(r"\\overleftarrow\s*\{\s*([A-Za-z])([A-Za-z])\s*\}"), r"\\overrightarrow{\2\1}"),
    (re.compile(r"(?<=\w)!\s*="), "! ="),  # else "not equal"
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\("), "sqrt("),
    (re.compile(r"(?<![A-Za-z\\{])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\{])infinity(?![A-Za-z])"), r"\\infty "),
    *(
        (re.compile(pattern), rf"\1\\text{{ {name}}}")
        for sign, name in _CURRENCIES
        for pattern in (rf"(?:{sign})\s*(\d[\d.,]*)", rf"(\d)\s*(?:{sign})")
    ),
    (re.compile(r"\s*\\(?:text|mathrm)\s*\{\s*(?:percent|per cent|percentage|pct)\s*\}"), r"\\%"),
    (THAT_IS, ""),  # a remark in an answer key: 100 (i.e., all values)
    # 2 1/2 and 1.5e-3: math-verify reads the first as 2 and the second as 1.5 * e - 3.
    (re.compile(r"(?<![\d.^_{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\d.A-Za-z])"), r"\1\\times 10^{\2}"),
)
# 12 dollars: math-verify drops units that are marked as text. Up to three letters may be a product, or pi.
_UNIT_IN_WORDS = re.compile(r"([-+]?[\d.,/]*\d)\s+([A-Za-z]{4,}(?: [A-Za-z]+){0,2})")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
# Only from the first of its signs: from each of thousands anew it would take seconds.
_LAST_SPACE = re.compile(r"(?<![\s.,;:])(?<!\\!)(?:\\[,;:! ]|[\s.,;:])+$")


@functools.lru_cache(maxsize=64)  # a question asks for its two texts several times
def normalize_expression(text: str) -> str:
    r"""Rewrite the spellings that math-verify 0.9.0 misreads; what it reads well is left alone.

    What changes only the looks (see `dress.py`), dollar signs around the whole, trailing punctuation,
    numerals (see `numerals.py`), quantities in several units, mixed
    numbers, scientific notation, `pi` in plain text and common Unicode signs.
    """
    text = without_wrappers(without_dress(without_wrappers(_ELLIPSIS.sub(r",\\ldots", text))))
    whole = STYLED.fullmatch(text)
    if whole and any(char.isdigit() for char in text):
        text = whole.group(1)  # \text{(-1, 2)}; words stay marked as text
    text = write_out_numerals(text.translate(_RAISED))
    text = in_one_unit(in_plain_units(text))
    text = _UNIT_IN_WORDS.sub(r"\1\\text{ \2}", text) if _UNIT_IN_WORDS.fullmatch(text) else mark_abbreviation(text)
    text = _OF_LETTERS.sub(_as_function, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if _SPACED_NUMBERS.fullmatch(text):
        text = _SPACE_BETWEEN.sub(",", text)  # 2 3 is read as a product
    return text.translate(_SYMBOLS).strip()


def _as_function(match: re.Match[str]) -> str:
    """The gcd of letters as a function without meaning: sympy takes it for 1, and the lcm for their product."""
    arguments = sorted(argument.strip() for argument in match["arguments"].split(","))
    return f"{(match['marked'] or match['command'])[0].upper()}_{{c}}({','.join(arguments)})"


def without_wrappers(text: str) -> str:
    """Without dollar signs, brackets of LaTeX and stars around the whole, and without punctuation at its end."""
    while True:
        before = text
        text = _LAST_SPACE.sub("", text.strip())
        for start, end in _WRAPPERS:
            inner = text[len(start) : len(text) - len(end)]
            if text.startswith(start) and text.endswith(end) and inner and start not in inner and end not in inner:
                text = inner
                break
        if text == before:
            return text
