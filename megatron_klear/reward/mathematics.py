"""math-verify as a reader and a judge of expressions, and what it must be helped with there."""

from __future__ import annotations

import cmath
import importlib
import logging
import math
from typing import Any

from megatron_klear.reward.spelling import normalize_expression

FLOAT_DECIMALS = 6
"""Decimals to which floats must agree (math-verify's default): 0.333333 equals 1/3, 0.333 does not."""
EXACT_DECIMALS = 15
"""Decimals to which exact numbers are computed when their forms differ (math-verify's default)."""
SIGNIFICANT_DIGITS = 4
"""Digits to which a float must agree with a small reference, whatever the decimals."""


class Mathematics:
    """math-verify 0.9.0 with its own time limits off: they use SIGALRM, which cannot stop a big-integer power.

    Attributes:
        sympy: the module.

    Raises:
        ImportError: math-verify or its parser is not installed.
    """

    def __init__(self) -> None:
        # Imported here and untyped: the caller's process must not load sympy, and neither package has types.
        library: Any = importlib.import_module("math_verify")
        self._parser: Any = importlib.import_module("math_verify.parser")
        self.sympy: Any = importlib.import_module("sympy")
        self._parse, self._verify = library.parse, library.verify
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the limits switched off
        # Its dropping of units takes the c of 2c for one. Ours is in units.py; the rest is its default.
        spelling = library.LatexNormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        )
        boxed = library.LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)
        self._boxed_targets = [boxed]
        self._prose_targets = [boxed, library.ExprExtractionConfig()]

    def read(self, text: str, *, is_boxed: bool = True) -> tuple[Any, str]:
        """The sympy object of a text and an empty text, or None and the problem.

        Raises:
            RecursionError, MemoryError: the parser gave up for lack of resources; math-verify would hide that.
        """
        expression = normalize_expression(text) if is_boxed else text
        source = rf"\boxed{{{expression}}}" if is_boxed else expression
        targets = self._boxed_targets if is_boxed else self._prose_targets
        found = self._parse(source, extraction_config=targets, parsing_timeout=None, raise_on_error=True)
        for item in found:
            if not isinstance(item, str):
                return item, ""
        if is_boxed and found:
            self._raise_resource_error(found[0])
        shown = text if len(text) <= 80 else text[:77] + "..."
        return None, repr(shown)

    def _raise_resource_error(self, normalized: str) -> None:
        """Parse a text that failed once more, to tell a text without meaning from a parser out of resources."""
        try:
            self._parser.parse_latex_cached(normalized)
        except (RecursionError, MemoryError):
            raise
        except Exception:
            return  # a syntax error: the text is no mathematics

    def is_defined(self, gold: Any) -> bool:
        return not (gold == self.sympy.nan or gold == self.sympy.zoo)

    def _decimals(self, gold: Any) -> int:
        """Decimals for comparing floats: six, and more for small references, so that 1e-7 is not 2e-7."""
        number = self.value(gold)
        if number is None or number == 0.0:
            return FLOAT_DECIMALS
        size = abs(number)
        return max(FLOAT_DECIMALS, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(size)))

    def equal(self, gold: Any, answer: Any) -> bool:
        decimals = self._decimals(gold)
        is_equal = bool(
            self._verify(
                gold,
                answer,
                float_rounding=decimals,
                numeric_precision=max(EXACT_DECIMALS, decimals),
                allow_set_relation_comp=True,
                timeout_seconds=None,
                raise_on_error=True,
            )
        )
        return is_equal and self._are_one_equation(gold, answer)

    def _are_one_equation(self, gold: Any, answer: Any) -> bool:
        """Whether two equations that math-verify takes for one have the same unknowns, and polynomials the same roots.

        It compares lists of solutions: two equations without any are equal to it, and so are those whose roots differ
        in how often they count.
        """
        equation = self.sympy.Eq
        if not (isinstance(gold, equation) and isinstance(answer, equation)) or gold == answer:
            return True
        if {symbol.name for symbol in gold.free_symbols} != {symbol.name for symbol in answer.free_symbols}:
            return False
        sides = [(item.lhs, item.rhs) for item in (gold, answer)]
        if not all(isinstance(side, self.sympy.Expr) for pair in sides for side in pair):
            return True
        left, right = (first - second for first, second in sides)
        symbols = sorted(gold.free_symbols, key=str)
        if not symbols or not (left.is_polynomial(*symbols) and right.is_polynomial(*symbols)):
            return bool(self.sympy.solve(gold, symbols))
        first, second = (self.sympy.Poly(side, *symbols) for side in (left, right))
        if first.total_degree() != second.total_degree():
            return bool(self.sympy.solve(gold, symbols))
        if first.is_zero or second.is_zero:
            return bool(first.is_zero and second.is_zero)
        share = first.LC() / second.LC()
        tolerance = 10.0**-FLOAT_DECIMALS
        return all(abs(complex(c)) <= tolerance for c in (first - second * share).coeffs())

    def number(self, text: str) -> complex | None:
        if not text:
            return None
        return self.value(self.read(text)[0])

    def value(self, value: Any) -> complex | None:
        """A number as a float; None for what is no number, infinite, or beyond floats."""
        if not isinstance(value, self.sympy.Expr) or value.free_symbols or not value.is_number:
            return None
        try:
            number = complex(value.evalf(15))
        except (TypeError, ValueError, OverflowError):
            return None
        return number if cmath.isfinite(number) else None
