"""Deciding one question with math-verify; runs inside a killable worker, because it can take any time and memory.

What counts as equal is math-verify's: units are dropped (5 cm equals 5), a percentage equals its number and its
fraction (50% equals 50 and 0.5), an inequality equals its interval, the order of a comma list does not matter.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any

from megatron_klear.reward.answers import Question, choice_letter, last_box, normalize_expression, words
from megatron_klear.reward.rules import Verdict

FLOAT_DECIMALS = 6
"""Decimals to which floats must agree (math-verify's default): 0.333333 equals 1/3, 0.333 does not."""
SIGNIFICANT_DIGITS = 4
"""Digits to which a float must agree with a small reference, whatever the decimals."""


class MathVerify:
    """math-verify 0.9.0 with its own time limits off: they use SIGALRM, which cannot stop a big-integer power.

    Raises:
        ImportError: math-verify or its parser is not installed.
    """

    def __init__(self) -> None:
        # Imported here and untyped: the caller's process must not load sympy, and neither package has types.
        library: Any = importlib.import_module("math_verify")
        self._parser: Any = importlib.import_module("math_verify.parser")
        self._sympy: Any = importlib.import_module("sympy")
        self._parse, self._verify = library.parse, library.verify
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the limits switched off
        boxed = library.LatexExtractionConfig(boxed_match_priority=0)
        self._boxed_targets = [boxed]
        self._prose_targets = [boxed, library.ExprExtractionConfig()]

    def judge(self, question: Question) -> Verdict:
        """The verdict on one question; whatever math-verify raises becomes `ungraded` with the reason.

        A reference that cannot be read is `ungraded` for every answer, also for one of the same spelling: a grade
        that could only be "correct" would bias the accuracy.
        """
        try:
            return self._judge(question)
        except Exception as error:  # the parser is fed by a model: anything can come out of it
            return Verdict("ungraded", f"the comparison failed: {type(error).__name__}: {str(error)[:200]}")

    def _judge(self, question: Question) -> Verdict:
        reference, problem = last_box(question.reference)
        if problem:
            return Verdict("ungraded", f"the reference cannot be read: {problem}")
        reference = question.reference if reference is None else reference
        decided = self._judge_text(question, reference)
        if decided:
            return decided
        gold, problem = self._read(reference)
        if problem or not self._is_defined(gold):
            return Verdict("ungraded", f"the reference cannot be read as mathematics: {problem or 'it is undefined'}")
        if question.answer is None:
            return Verdict("wrong", question.no_answer_reason)
        answer, problem = self._read(question.answer, is_boxed=question.is_boxed)
        if problem:
            return Verdict("wrong", f"the answer cannot be read as mathematics: {problem}")
        equal = self._verify(
            gold,
            answer,
            float_rounding=self._decimals(gold),
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
        return Verdict("correct", "equal to the reference") if equal else Verdict("wrong", "not equal to the reference")

    def _judge_text(self, question: Question, reference: str) -> Verdict | None:
        """The verdict where the reference is a choice or words; None leaves it to the mathematics."""
        letter, phrase = choice_letter(reference), words(reference)
        if letter is None and phrase is None:
            return None
        if question.answer is None:
            return Verdict("wrong", question.no_answer_reason)
        if letter is not None and choice_letter(question.answer, with_text=True) == letter:
            return Verdict("correct", f"the choice is {letter}")
        answer_words = words(question.answer)
        if phrase is not None and answer_words is not None:
            same = phrase == answer_words
            return Verdict("correct", "the same words") if same else Verdict("wrong", "not the words of the reference")
        return None

    def _read(self, text: str, *, is_boxed: bool = True) -> tuple[Any, str]:
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

    def _is_defined(self, gold: Any) -> bool:
        return not (gold == self._sympy.nan or gold == self._sympy.zoo)

    def _decimals(self, gold: Any) -> int:
        """Decimals for comparing floats: six, and more for small references, so that 1e-7 is not 2e-7."""
        if not isinstance(gold, self._sympy.Number):
            return FLOAT_DECIMALS
        size = abs(float(gold))
        if size == 0.0 or not math.isfinite(size):
            return FLOAT_DECIMALS
        return max(FLOAT_DECIMALS, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(size)))
