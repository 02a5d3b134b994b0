"""The split of a response into thinking and answer."""

from __future__ import annotations

import pytest

from megatron_klear.reward import AnswerFormat, split_thinking

DEFAULT = AnswerFormat()
OPTIONAL = AnswerFormat(require_think=False)
OTHER_MARKERS = AnswerFormat(think_start="[[", think_end="]]")


@pytest.mark.parametrize(
    ("response", "fmt", "thinking", "answer"),
    [
        ("<think>a</think>b", DEFAULT, "a", "b"),
        ("\n <think>\na\n</think>\n\nb\n", DEFAULT, "\na\n", "\n\nb\n"),
        ("<think></think>b", DEFAULT, "", "b"),
        ("only an answer", OPTIONAL, "", "only an answer"),
        ("<think>a</think>b", OPTIONAL, "a", "b"),
        ("[[a]]b <think>", OTHER_MARKERS, "a", "b <think>"),
        ("<think>a < b > c</think>x<y", DEFAULT, "a < b > c", "x<y"),
    ],
)
def test_well_formed_responses_are_cut_at_the_markers(
    response: str, fmt: AnswerFormat, thinking: str, answer: str
) -> None:
    split = split_thinking(response, fmt)
    assert not split.is_malformed
    assert (split.thinking, split.answer) == (thinking, answer)


@pytest.mark.parametrize(
    ("response", "fmt", "words"),
    [
        ("", DEFAULT, "<think> is missing"),
        ("b", DEFAULT, "<think> is missing"),
        ("a</think>b", DEFAULT, "<think> is missing"),
        ("<think>a", DEFAULT, "</think> is missing"),
        ("<think>a<think>b</think>c", DEFAULT, "<think> occurs 2 times"),
        ("<think>a</think>b<think>c</think>d", DEFAULT, "<think> occurs 2 times"),
        ("<think>a</think>b</think>c", DEFAULT, "</think> occurs 2 times"),
        ("</think>a<think>b", DEFAULT, "closed before it is opened"),
        ("Sure! <think>a</think>b", DEFAULT, "text comes before it"),
        ("<think>a</think>", DEFAULT, "no answer after </think>"),
        ("<think>a</think> \n\t", DEFAULT, "no answer after </think>"),
        ("<THINK>a</THINK>b", DEFAULT, "<think> is missing"),
        ("<think>a", OPTIONAL, "</think> is missing"),
        ("a</think>b", OPTIONAL, "<think> is missing"),
        (" ", OPTIONAL, "empty"),
    ],
)
def test_malformed_responses_say_why(response: str, fmt: AnswerFormat, words: str) -> None:
    split = split_thinking(response, fmt)
    assert split.is_malformed
    assert words in split.problem
    assert (split.thinking, split.answer) == ("", "")


@pytest.mark.parametrize("response", ["<think>still going", "<think>done</think>"])
def test_a_cut_off_response_is_malformed_and_names_the_token_limit(response: str) -> None:
    assert "token limit" in split_thinking(response, finish_reason="length").problem
    assert "token limit" not in split_thinking(response, finish_reason="stop").problem


def test_split_parts_make_up_the_response() -> None:
    response = "  <think>t1\nt2</think>\nanswer\x00\ud800"
    split = split_thinking(response)
    assert f"  <think>{split.thinking}</think>{split.answer}" == response
