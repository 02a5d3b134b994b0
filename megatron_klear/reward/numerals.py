r"""Numbers written in ways that math-verify 0.9.0 misreads, as numbers that it reads.

It reads `1\,000` as 1 * 0, `0x1F` as a product with 0, `3!!` as (3!)!, and drops the million of 5 million as a unit.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from megatron_klear.reward.latex import UPRIGHT

_SPACE = r"(?:\s|~|\\[,;:! ])*"
_REPEATING = re.compile(r"(?<![\d.])(\d{1,20})\.(\d{0,20})\\overline\s*\{\s*(\d{1,40})\s*\}")
_GROUPED_DIGITS = re.compile(r"(?<![\d.\\])\d{1,3}(?:(?:\\[,; ]|[ ~\u00a0\u2009\u202f])\d{3})+(?!\d)")
_LITERAL = re.compile(r"(?<![\w.])0(?:[xX][0-9A-Fa-f]{1,64}|[bB][01]{1,256}|[oO][0-7]{1,128})(?!\w)")
_DOUBLE_FACTORIAL = re.compile(r"(?<![\d.\w])(\d{1,3})\s*!!(?!\s*[!=])")
_POWERS = {
    "hundred": 2,
    "thousand": 3,
    "lakh": 5,
    "million": 6,
    "crore": 7,
    "billion": 9,
    "trillion": 12,
    "quadrillion": 15,
}
_MAGNITUDE = rf"(?P<power>(?i:{'|'.join(_POWERS)}))s?(?![A-Za-z])"
_MARKED = rf"{UPRIGHT}\s*\{{\s*{_MAGNITUDE}\s*(?P<rest>[^{{}}]*)\}}"
_NUMBER_OF = re.compile(rf"(?<![\d.,])(?P<number>\d{{1,3}}(?:,\d{{3}})+|\d{{1,20}}(?:\.\d{{1,20}})?){_SPACE}{_MARKED}")
_PLAIN_NUMBER_OF = re.compile(_NUMBER_OF.pattern.removesuffix(_MARKED) + _MAGNITUDE)
_VALUE_OF = re.compile(rf"(?P<value>.*\S){_SPACE}(?:{_MARKED})", re.DOTALL)


def write_out_numerals(text: str) -> str:
    r"""Write out repeating decimals, grouped digits, literals, double factorials and magnitudes.

    `5\text{ million dollars}` becomes `5000000\text{ dollars}`.
    """
    text = _REPEATING.sub(_repeating_decimal, text)
    text = _GROUPED_DIGITS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _LITERAL.sub(lambda match: str(int(match.group(), 0)), text)
    text = _DOUBLE_FACTORIAL.sub(lambda match: str(math.prod(range(int(match[1]), 0, -2))), text)
    return _without_magnitudes(text)


def _repeating_decimal(match: re.Match[str]) -> str:
    """0.1 and a repeating 6 as 15/90: digits with one period less those before it, over nines and zeros."""
    whole, start, period = match.groups()
    numerator = int(whole + start + period) - int((whole + start) or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(start)}}}"


def _without_magnitudes(text: str) -> str:
    while True:  # 5 hundred thousand
        before = text
        text = _NUMBER_OF.sub(lambda match: _power_of_ten(match) + _unit(match["rest"]), text)
        text = _PLAIN_NUMBER_OF.sub(_power_of_ten, text)
        if text == before:
            break
    other = _VALUE_OF.fullmatch(text)
    if other is None:
        return text
    return rf"({other['value']}) \cdot 10^{{{_POWERS[other['power'].lower()]}}}{_unit(other['rest'])}"


def _power_of_ten(match: re.Match[str]) -> str:
    number = Decimal(match["number"].replace(",", "")).scaleb(_POWERS[match["power"].lower()])
    return (
        format(number, "f").rstrip("0").rstrip(".") if number != number.to_integral_value() else format(number, ".0f")
    )


def _unit(rest: str) -> str:
    return rf"\text{{ {rest.strip()}}}" if rest.strip() else ""
