"""Deciding one question with math-verify; runs inside a killable worker, because it can take any time and memory.

What counts as equal is math-verify's: a unit that one side does not name is dropped (5 cm equals 5), a percentage
equals its number and its fraction (50% equals 50 and 0.5), an inequality equals its interval, the order of a comma list
does not matter. What it forgets of how an answer is written is compared beside it: named values, sets and tuples, two
different units, the sides of an equation, the base of a number, repeated values (see `shape.py` and `units.py`).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from megatron_klear.reward import conditions, formulas, remarks, shape
from megatron_klear.reward.answers import Question, last_box
from megatron_klear.reward.in_words import judge_congruence, judge_formula, judge_text, with_digits, with_sets
from megatron_klear.reward.latex import without_long_spaces
from megatron_klear.reward.letters import tell_apart, with_imaginary_unit
from megatron_klear.reward.mathematics import Mathematics
from megatron_klear.reward.rules import Verdict
from megatron_klear.reward.spelling import normalize_expression
from megatron_klear.reward.values import bare, units_disagree, without_units

EQUATION_TOLERANCE = 1e-9
"""Share by which the sides of an equation of numbers may differ; more where one is a rounded decimal: 22/7 = 3.14."""
PLAIN_NUMBER = "0.8271"
"""An answer that any reference can be compared with."""
MOST_PAIRED = 64
"""Values of a list that are paired one by one where some are repeated."""


@functools.lru_cache(maxsize=64)
def _without_remarks(text: str) -> str:
    """An expression without the set of its parameter, with both signs written out."""
    expression, _, _ = remarks.split_domain(remarks.with_plain_letters(normalize_expression(text)))
    return shape.both_signs(expression)


def _in_one_parameter(reference: str, answer: str) -> tuple[str, str]:
    """Both without remarks; a parameter that both give a set has one name."""
    (_, name, _), (_, given, _) = (remarks.split_domain(normalize_expression(text)) for text in (reference, answer))
    gold, text = _without_remarks(reference), _without_remarks(answer)
    return gold, remarks.rename_letter(text, given, name) if name and given and name != given else text


class MathVerify:
    """Judges questions: first what needs no mathematics, then the way both texts are written, then what they mean.

    Raises:
        ImportError: math-verify or its parser is not installed.
    """

    def __init__(self) -> None:
        self.mathematics = Mathematics()
        self._read, self._equal = self.mathematics.read, self.mathematics.equal
        self._sympy: Any = self.mathematics.sympy

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
        reference = without_long_spaces(question.reference if reference is None else reference)
        if question.answer is not None:
            question = question._replace(answer=without_long_spaces(question.answer))
        forms, given_forms = remarks.equivalents(reference), remarks.equivalents(question.answer or "")
        if question.is_boxed and max(len(forms), len(given_forms)) > 1:
            return self._judge_forms(question, forms, given_forms)
        question, reference = with_sets(*with_digits(question, reference))
        name, reference = shape.named_by_operator(reference)
        if question.answer is not None and (name or len(shape.sides(reference)) == 1):
            given, answer = shape.named_by_operator(question.answer)
            # Of another name than the reference has: left as it is, which no parser reads.
            question = question if name and given not in ("", name) else question._replace(answer=answer)
        decided = (
            judge_text(question, reference)
            or judge_formula(question, reference)
            or judge_congruence(question, reference)
            or self._judge_unreadable(question, reference)
        )
        if decided:
            return decided
        gold, problem = self._read(bare(_without_remarks(reference)))
        if problem or not self.mathematics.is_defined(gold):
            return Verdict("ungraded", f"the reference cannot be read as mathematics: {problem or 'it is undefined'}")
        if question.answer is None:
            return Verdict("wrong", question.no_answer_reason)
        try:
            return self._compare(reference, gold, question.answer, is_boxed=question.is_boxed)
        except (RecursionError, MemoryError) as error:
            # The reference was read: the answer alone is too much, and must not escape its grade by that.
            return Verdict("wrong", f"the answer takes more than the grader has: {type(error).__name__}")
        except Exception as error:
            # The same here: an answer on which math-verify fails is to blame, unless it fails on the reference, too.
            for sound in (reference, PLAIN_NUMBER):
                self._compare(reference, gold, sound, is_boxed=True)
            return Verdict("wrong", f"the answer cannot be compared: {type(error).__name__}: {str(error)[:200]}")

    def _judge_forms(self, question: Question, forms: list[str], answers: list[str]) -> Verdict:
        """The verdict on a value in several forms: any of the reference will do, all of an answer must."""
        verdicts = []
        for answer in answers:
            given = question._replace(answer=None if question.answer is None else answer)
            found = [self._judge(given._replace(reference=form)) for form in forms]
            by_outcome = {verdict.outcome: verdict for verdict in found}
            verdicts.append(by_outcome.get("correct") or by_outcome.get("wrong") or found[0])
        return next((verdict for verdict in verdicts if verdict.outcome != "correct"), verdicts[0])

    def _compare(self, reference: str, gold: Any, text: str, *, is_boxed: bool) -> Verdict:
        """Compare an answer with a reference that was read; both as they were written, and as mathematics."""
        verdict = self._compare_once(reference, gold, text, is_boxed=is_boxed)
        if verdict.outcome == "wrong" and shape.has_open_log(reference):
            reference, text = shape.with_natural_log(reference), shape.with_natural_log(text)
            gold, problem = self._read(bare(_without_remarks(reference)))
            if not problem:
                verdict = self._compare_once(reference, gold, text, is_boxed=is_boxed)
        if verdict.outcome == "wrong" and is_boxed and shape.are_spelled_alike(reference, text):
            return Verdict("correct", "written as the reference")  # 12 m^2, a formula or an area, and 12m^2
        return verdict

    def _compare_once(self, reference: str, gold: Any, text: str, *, is_boxed: bool) -> Verdict:
        if not is_boxed:
            answer, problem = self._read(text, is_boxed=False)
            return self._verdict(gold, answer, problem)
        read_as = bare(_without_remarks(reference))
        decided = self._judge_remarks(reference, text)
        if decided is not None:
            return decided
        reference, text = _in_one_parameter(reference, text)
        reference, text = with_imaginary_unit(*tell_apart(reference, text))
        decided = (
            self._judge_approximation(reference, gold, text)
            or self._judge_joined(reference, text)
            or self._judge_shape(reference, text)
        )
        if decided is not None:
            return decided
        decided = self._judge_conditions(reference, text)
        if decided is not None:
            return decided
        rewritten, text = self._common_form(reference, text)
        percentages = shape.percentage(rewritten), shape.percentage(text)
        if any(percentages):
            return self._compare_percentages(rewritten, text, *percentages)
        if rewritten != read_as:
            gold, problem = self._read(rewritten)
            if problem:
                raise ValueError(f"the reference cannot be read as {rewritten[:80]!r}")
        answer, problem = self._read(text)
        verdict = self._verdict(gold, answer, problem)
        if verdict.outcome == "correct" and not self._same_repetitions(rewritten, text):
            return Verdict("wrong", "other values are repeated than in the reference")
        if verdict.outcome == "wrong" and conditions.has_inequality(rewritten) and conditions.has_inequality(text):
            return self._compare_conditions(rewritten, text) or verdict
        return verdict

    def _verdict(self, gold: Any, answer: Any, problem: str) -> Verdict:
        if problem:
            return Verdict("wrong", f"the answer cannot be read as mathematics: {problem}")
        equal = self._equal(gold, answer)
        return Verdict("correct", "equal to the reference") if equal else Verdict("wrong", "not equal to the reference")

    @staticmethod
    def _judge_remarks(reference: str, answer: str) -> Verdict | None:
        """The verdict where an answer says something beside its value which the reference does not say."""
        explained = remarks.explanations(answer) - remarks.explanations(reference)
        if explained:
            return Verdict("wrong", f"the answer explains its value by a number: {', '.join(sorted(explained))[:80]}")
        reference, answer = normalize_expression(reference), normalize_expression(answer)
        more = remarks.changing_words(answer) - remarks.changing_words(reference)
        if more:
            return Verdict("wrong", f"the answer adds to its value: {', '.join(sorted(more))[:80]}")
        if remarks.is_to_be_done(shape.sides(answer)[-1]) and not remarks.is_to_be_done(reference):
            return Verdict(
                "wrong", "the answer leaves a sum, product, limit, derivative, integral or residue to be done"
            )
        domains = [remarks.split_domain(text)[2] for text in (reference, answer)]
        if all(domains) and domains[0] != domains[1]:
            return Verdict("wrong", "the parameter is of another set than in the reference")
        return None

    def _judge_approximation(self, reference: str, gold: Any, answer: str) -> Verdict | None:
        """The verdict on `a \\approx b`: both must agree as far as b is written, and one with the reference."""
        parts = remarks.approximations(answer)
        if len(parts) < 2 or len(remarks.approximations(reference)) > 1:
            return None
        named = parts[1:] if shape.is_name(parts[0]) else parts  # x \\approx 5
        values = [(self.mathematics.number(shape.sides(part)[-1]), part) for part in named]
        exact = values[0][0]
        if exact is None or any(
            value is None or abs(value - exact) > shape.last_place(part, abs(exact)) for value, part in values[1:]
        ):
            return Verdict("wrong", "the answer calls numbers approximately equal that are not")
        verdicts = [self._compare(reference, gold, part, is_boxed=True) for part in named]
        return next((verdict for verdict in verdicts if verdict.outcome == "correct"), verdicts[0])

    def _judge_joined(self, reference: str, answer: str) -> Verdict | None:
        """The verdict where relations between several unknowns are joined by `or`, in one of both at least."""
        if not conditions.has_or(reference) and not conditions.has_or(answer):
            return None
        gold, given = formulas.relations(reference), formulas.relations(answer)
        if gold is None or given is None:
            named = shape.named_values(answer)
            if named and conditions.has_or(answer) and len(shape.items(reference)) != 1:
                return Verdict("wrong", "the answer has alternatives, the reference values that belong together")
            return None
        if not formulas.are_about_several(gold) and not formulas.are_about_several(given):
            return None
        given = formulas.with_common_relations(gold, given, self._are_one_relation)
        same = formulas.are_equal(gold, given)
        return (
            Verdict("correct", "the same relations, joined in the same way")
            if same
            else Verdict("wrong", "other relations than in the reference, or joined otherwise")
        )

    def _are_one_relation(self, reference: str, answer: str) -> bool:
        if formulas.letters_of(reference) != formulas.letters_of(answer):
            return False
        gold, given = self._read(reference)[0], self._read(answer)[0]
        if gold is None or given is None:
            return reference.replace(" ", "") == answer.replace(" ", "")
        return self._equal(gold, given)

    def _judge_conditions(self, reference: str, answer: str) -> Verdict | None:
        """The verdict where several inequalities are joined, which math-verify takes for a list."""
        joined, given = conditions.connectives(reference), conditions.connectives(answer)
        if not joined and not given:
            return None
        verdict = self._compare_conditions(reference, answer)
        if verdict is None and len(joined) == len(given) == 1 and joined | given == {"and", "or"}:
            return Verdict("wrong", "the conditions are joined otherwise than in the reference")
        return verdict

    def _compare_conditions(self, reference: str, answer: str) -> Verdict | None:
        gold, given = (
            conditions.solutions(text, lambda part: self._read(part)[0], self._sympy) for text in (reference, answer)
        )
        if gold is None or given is None:
            return None
        if gold.name != given.name and gold.name and given.name:
            return Verdict("wrong", f"a condition on {given.name}, where the reference has {gold.name}")
        return self._verdict(gold.values, given.values, "")

    def _compare_percentages(self, reference: str, answer: str, gold: str | None, given: str | None) -> Verdict:
        """Compare where one at least is a percentage, which equals its number and its fraction."""
        value, problem = self._read(reference if gold is None else gold)
        if problem:
            raise ValueError(f"the reference cannot be read as {reference[:80]!r}")
        other, problem = self._read(answer if given is None else given)
        verdict = self._verdict(value, other, problem)
        numbers = isinstance(value, self._sympy.Expr) and isinstance(other, self._sympy.Expr)
        if verdict.outcome == "correct" or not numbers or (gold is not None) == (given is not None):
            return verdict
        return self._verdict(value / 100, other, "") if gold is not None else self._verdict(value, other / 100, "")

    def _judge_shape(self, reference: str, answer: str) -> Verdict | None:
        """The verdict where the way an answer is written decides; None leaves it to the mathematics."""
        decided = self._judge_colons(reference, answer)
        if decided is not None:
            return decided
        if shape.has_ellipsis(reference) != shape.has_ellipsis(answer):
            return Verdict("wrong", "one of reference and answer goes on without end, the other ends")
        in_base = shape.same_in_base(reference, answer)
        if in_base is not None:
            return Verdict("correct", "the same number") if in_base else Verdict("wrong", "not the number in that base")
        kinds = {shape.brackets(reference), shape.brackets(answer)}
        if kinds == {"set", "tuple"}:
            return Verdict("wrong", "one of reference and answer is a set, the other has an order")
        if shape.are_of_other_ends(reference, answer):
            return Verdict("wrong", "a pair in other brackets than in the reference")
        if shape.has_cases(answer) and not shape.has_cases(reference):
            return Verdict("wrong", "the answer says several things for several cases")
        if shape.is_closed_at_infinity(answer) and not shape.is_closed_at_infinity(reference):
            return Verdict("wrong", "an interval that includes infinity")
        named, given_names = shape.named_values(reference), shape.named_values(answer)
        several_names = given_names is not None and len({name.split("_")[0] for name in given_names}) > 1
        if shape.are_single_alternatives(reference) and (several_names or shape.brackets(answer) == "tuple"):
            return Verdict("wrong", "the values of the reference are alternatives, those of the answer are not")
        if shape.brackets(reference) == "tuple" and shape.are_single_alternatives(answer):
            return Verdict("wrong", "the answer has alternatives, the reference values that belong together")
        if named is not None and given_names is not None:
            return self._compare_named(named, given_names)
        if named is not None and shape.brackets(answer) == "set":
            return Verdict("wrong", "the answer is a set, the values of the reference have names")
        if shape.are_of_different_functions(reference, answer):
            return Verdict("wrong", "the answer is about another function, or another place")
        if self._is_false(answer):
            return Verdict("wrong", "the answer is an equation that does not hold")
        disagreement = units_disagree(reference, answer)
        if disagreement:
            return Verdict("wrong", disagreement)
        gold_way, way = shape.directions(reference), shape.directions(answer)
        if gold_way and way and gold_way != way:
            return Verdict("wrong", f"{', '.join(sorted(way))}, where the reference says {', '.join(sorted(gold_way))}")
        return None

    def _judge_colons(self, reference: str, answer: str) -> Verdict | None:
        """The verdict on times of day and ratios; a ratio of two terms, none of them 0, is left to the mathematics."""
        time = shape.clock(reference)
        if time is not None:
            given = shape.clock(answer, needs_half=False)
            same = given is not None and given[:2] == time[:2] and given.half in ("", time.half)
            return Verdict("correct", "the same time") if same else Verdict("wrong", "not the time of the reference")
        terms, given_terms = shape.ratio(reference), shape.ratio(answer)
        moment, given_moment = shape.time_of_day(reference), shape.time_of_day(answer)
        if moment and (shape.has_zero(terms) or given_moment):
            same = moment == given_moment
            return Verdict("correct", "the same time") if same else Verdict("wrong", "not the time of the reference")
        if max(len(terms), len(given_terms)) > 2 or shape.has_zero(terms):
            same = not shape.are_named_otherwise(reference, answer) and self._are_proportional(terms, given_terms)
            return Verdict("correct", "the same ratio") if same else Verdict("wrong", "not the ratio of the reference")
        return None

    def _judge_unreadable(self, question: Question, reference: str) -> Verdict | None:
        """The verdict where the parser would divide by the 0 of the reference: times on the hour, ratios with a 0."""
        reference = normalize_expression(reference)
        if not question.is_boxed or not (shape.clock(reference) or shape.has_zero(shape.ratio(reference))):
            return None
        answer = "" if question.answer is None else question.answer
        verdict = self._judge_colons(*tell_apart(reference, normalize_expression(answer)))
        return Verdict("wrong", question.no_answer_reason) if verdict and question.answer is None else verdict

    def _are_proportional(self, golds: list[str], answers: list[str]) -> bool:
        """Whether two ratios with terms (a, b, ...) and (p, q, ...) are one: a q = b p for the first b that is not 0.

        Raises:
            ValueError: a term of the reference cannot be read, or all of them are 0.
        """
        left, right = ([self._read(term)[0] for term in terms] for terms in (golds, answers))
        known = [i for i, term in enumerate(left) if term is not None and self.mathematics.value(term) != 0]
        if any(term is None for term in left) or not known:
            raise ValueError(f"the ratio {':'.join(golds)[:80]!r} of the reference cannot be read")
        if len(golds) != len(answers) or any(term is None for term in right):
            return False
        b, q = (self._sympy.sympify(terms[known[0]]) for terms in (left, right))
        if self.mathematics.value(q) == 0:
            return False
        return all(self._equal(self._sympy.sympify(a) * q, b * p) for a, p in zip(left, right, strict=True))

    def _compare_named(self, named: dict[str, str], given: dict[str, str]) -> Verdict:
        if set(named) != set(given):
            return Verdict("wrong", f"values of {', '.join(given)}, where the reference has {', '.join(named)}")
        for name in named:
            value, given_value = without_units(named[name], given[name])
            gold, problem = self._read(value)
            if problem:
                return Verdict("ungraded", f"the reference cannot be read as mathematics: {problem}")
            answer, problem = self._read(given_value)
            if problem or not self._equal(gold, answer):
                return Verdict("wrong", f"not equal to the reference in {name}")
        return Verdict("correct", "equal to the reference in each name")

    def _common_form(self, reference: str, answer: str) -> tuple[str, str]:
        """Reference and answer so that mathematics alone is left: same unit, no names that one of them lacks."""
        reference, answer = without_units(reference, answer)
        named, given = shape.named_values(reference), shape.named_values(answer)
        if named is not None and given is None:
            reference = f"({', '.join(shape.in_order(named))})"
            return reference, f"({answer})" if shape.brackets(answer) == "list" else answer
        if given is not None:
            values = ", ".join(shape.in_order(given))
            return reference, f"({values})" if shape.brackets(reference) == "tuple" else values
        columns = shape.column(reference), shape.column(answer)
        if columns[0] and shape.brackets(answer) == "tuple":
            reference = columns[0]
        elif columns[1] and shape.brackets(reference) == "tuple":
            answer = columns[1]
        right_sides = shape.same_left_side(reference, answer)
        if right_sides is not None:
            return right_sides
        value = shape.value_of_function(reference)
        return (value, answer) if value is not None and len(shape.sides(answer)) == 1 else (reference, answer)

    def _is_false(self, text: str) -> bool:
        """Whether a text is an equation, or a chain of them, of which two sides are numbers that differ."""
        parts = shape.sides(text)
        if len(parts) < 2:
            return False
        known = [
            (value, shape.rounding(part)) for part in parts if (value := self.mathematics.number(part)) is not None
        ]
        return any(
            abs(left - right) > max(EQUATION_TOLERANCE * max(abs(left), abs(right)), one, other)
            for (left, one), (right, other) in itertools.combinations(known, 2)
        )

    def _same_repetitions(self, reference: str, answer: str) -> bool:
        """Whether two lists repeat the same values; as sets, math-verify counts each once.

        A set in braces has each value once, and alternatives for one unknown say nothing of how often one counts.
        """
        golds, answers = shape.items(reference), shape.items(answer)
        if max(len(golds), len(answers)) > MOST_PAIRED:
            return True
        if len(golds) != len(answers):
            if any(shape.brackets(text) == "set" or shape.are_alternatives(text) for text in (reference, answer)):
                return True
            return not self._has_repetition(reference) and not self._has_repetition(answer)
        if len(golds) < 3:
            return True
        left = [self._read(part)[0] for part in answers]
        for gold in (self._read(part)[0] for part in golds):
            if gold is None:
                return True
            found = next((i for i, value in enumerate(left) if value is not None and self._equal(gold, value)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _has_repetition(self, text: str) -> bool:
        """Whether a value occurs twice in a list; 1,000,000 is none."""
        if not isinstance(self._read(text)[0], self._sympy.FiniteSet):
            return False
        values = [value for part in shape.items(text) if (value := self._read(part)[0]) is not None]
        return any(self._equal(one, other) for one, other in itertools.combinations(values, 2))
