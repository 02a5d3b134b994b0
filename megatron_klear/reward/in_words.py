"""Verdicts that need no mathematics: choices, words, formulas of logic and sets, congruences."""

from __future__ import annotations

from megatron_klear.reward import formulas, geometry, shape
from megatron_klear.reward.answers import Question
from megatron_klear.reward.rules import Verdict
from megatron_klear.reward.spelling import normalize_expression
from megatron_klear.reward.textual import (
    are_both_without_solution,
    choice_letter,
    is_phrase,
    number_in_words,
    same_choices,
    same_statements,
    same_text,
    same_words,
    says_verdict,
    set_in_words,
    word_list,
    words,
)


def with_digits(question: Question, reference: str) -> tuple[Question, str]:
    """A number in words as digits where the other text is not in words."""
    if question.answer is None:
        return question, reference
    gold, given = number_in_words(reference), number_in_words(question.answer)
    if gold and not given and words(question.answer) is None:
        return question, gold
    return (question._replace(answer=given), reference) if given and words(reference) is None else (question, reference)


def with_sets(question: Question, reference: str) -> tuple[Question, str]:
    r"""`all real numbers` as `\mathbb{R}`, where the other text is not in words or says such a thing, too."""
    if question.answer is None:
        return question, reference
    gold, given = set_in_words(reference), set_in_words(question.answer)
    if given and (gold or words(reference) is None):
        question = question._replace(answer=given)
    return (question, gold) if gold and (given or words(question.answer or "") is None) else (question, reference)


def judge_text(question: Question, reference: str) -> Verdict | None:
    """The verdict where the reference is a choice or words; None leaves it to the mathematics."""
    if question.answer is not None and are_both_without_solution(reference, question.answer):
        return Verdict("correct", "both say that there is none")
    letter, phrase, gold_list = choice_letter(reference), words(reference), word_list(reference)
    if letter is None and phrase is None and not gold_list:
        return _judge_choices(question, reference)
    if question.answer is None:
        return Verdict("wrong", question.no_answer_reason)
    same = same_statements(reference, question.answer)
    if same is not None:
        return Verdict("correct", "the same statements") if same else Verdict("wrong", "not those statements")
    if gold_list and (given := word_list(question.answer)):
        return Verdict("correct", "the same words") if gold_list == given else Verdict("wrong", "not those words")
    if phrase is not None and same_text(reference, question.answer):
        return Verdict("correct", "the same words")
    if says_verdict(reference, question.answer):
        return Verdict("correct", "the same words")
    decided = _judge_choices(question, reference)
    if decided is not None and words(question.answer) is None:
        return decided
    if letter is not None and choice_letter(question.answer, with_text=True) == letter:
        return Verdict("correct", f"the choice is {letter}")
    answer_words = words(question.answer)
    if phrase is not None and answer_words is not None:
        same = same_words(reference, question.answer)
        return Verdict("correct", "the same words") if same else Verdict("wrong", "not the words of the reference")
    if phrase is not None and is_phrase(phrase):
        return Verdict("wrong", "the reference is in words, the answer is not")
    return None


def _judge_choices(question: Question, reference: str) -> Verdict | None:
    same = None if question.answer is None else same_choices(reference, question.answer)
    if same is None:
        return None
    return Verdict("correct", "the same choices") if same else Verdict("wrong", "not the choices of the reference")


def judge_formula(question: Question, reference: str) -> Verdict | None:
    r"""The verdict where the reference is a formula of logic or sets, or a statement such as `AB \parallel CD`."""
    gold, fact = formulas.formula(reference), geometry.statement(reference)
    is_formula = gold is not None and gold.has_signs and formulas.is_joined(gold.tree)
    if not question.is_boxed or not (is_formula or fact):
        return None
    if question.answer is None:
        return Verdict("wrong", question.no_answer_reason)
    if fact:
        same = geometry.statement(question.answer) == fact
    else:
        given = formulas.formula(question.answer)
        same = gold is not None and given is not None and formulas.are_equal(gold, given)
    return Verdict("correct", "says the same") if same else Verdict("wrong", "does not say what the reference says")


def judge_congruence(question: Question, reference: str) -> Verdict | None:
    """The verdict where the reference is a congruence, which the parser cannot read; a bare residue agrees, too."""
    gold = shape.congruence(normalize_expression(reference))
    if gold is None or not question.is_boxed:
        return None
    if question.answer is None:
        return Verdict("wrong", question.no_answer_reason)
    text = normalize_expression(question.answer)
    given = shape.congruence(text) or shape.congruence(rf"{text} \pmod{{{gold.modulus}}}")
    same = given is not None and gold.agrees_with(given)
    return Verdict("correct", "the same congruence") if same else Verdict("wrong", "not the congruence asked for")
