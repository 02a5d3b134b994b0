"""SFT files to examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.data import ChatTokenizer, load_chat_tokenizer, load_sft
from megatron_klear.errors import DataError

Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def chat(thinking_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(thinking_tokenizer)


def row(row_id: str, question: str = "1+1?", answer: str = "<think>\nhm\n</think>\n\n2", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": messages, **more}


def test_examples_hold_the_tokens_and_the_mask_of_the_answer(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    data = load_sft([write_jsonl(row("a", source="web"), row("b", "2+2?"))], chat, token_budget=1000)
    assert [e.sequence_id for e in data.examples] == ["a", "b"]
    example = data.examples[0]
    assert example.source == "web"
    assert example.token_ids.dtype == np.int32
    mask = example.trained_mask
    assert mask.dtype == np.bool_
    assert chat.decode(example.token_ids[mask]) == "<think>\nhm\n</think>\n\n2<|im_end|>"
    assert chat.decode(example.token_ids[~mask]) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert not mask[0]
    assert example.trained_tokens == mask.sum()
    assert data.dropped_ids == ()


def test_more_rows_than_are_tokenized_at_a_time(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    data = load_sft([write_jsonl(*[row(f"{n}", f"{n}?") for n in range(700)])], chat, token_budget=1000)
    assert len(data) == 700
    for n in (0, 511, 512, 699):
        assert f"user\n{n}?<|im_end|>" in chat.decode(data.examples[n].token_ids)


def test_all_bad_conversations_are_told_with_file_and_line(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    path = write_jsonl(row("a", answer="<|im_end|>"), row("b"), row("c", answer="<think>\nand then he"))
    with pytest.raises(DataError) as caught:
        load_sft([path], chat, token_budget=1000)
    assert f"{path}:1: message 2 holds the chat marker <|im_end|>" in str(caught.value)
    assert f"{path}:3: the last answer opens <think> and never closes it" in str(caught.value)
    assert str(caught.value).startswith("2 problems")


def test_long_conversations_are_refused_or_dropped_and_counted(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    path = write_jsonl(row("short"), row("long", answer="<think>\n" + "x" * 500 + "\n</think>\n\n2"))
    with pytest.raises(DataError) as caught:
        load_sft([path], chat, token_budget=300)
    assert f"sequence long ({path}:2): " in str(caught.value)
    assert "packing.oversize=drop" in str(caught.value)
    data = load_sft([path], chat, token_budget=300, oversize="drop")
    assert [e.sequence_id for e in data.examples] == ["short"]
    assert data.dropped_ids == ("long",)
    with pytest.raises(DataError, match=r"all 2 conversations are over packing\.token_budget = 10 tokens"):
        load_sft([path], chat, token_budget=10, oversize="drop")


def test_padding_counts_towards_the_budget(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    path = write_jsonl(row("a"))
    length = len(load_sft([path], chat, token_budget=1000).examples[0].token_ids)
    assert len(load_sft([path], chat, token_budget=length)) == 1
    with pytest.raises(DataError, match="padded to a multiple of 64"):
        load_sft([path], chat, token_budget=length, multiple=64)


def test_the_fingerprint_tells_data_apart(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    def fingerprint(*rows: dict[str, Any]) -> str:
        return load_sft([write_jsonl(*rows)], chat, token_budget=1000).fingerprint

    same = fingerprint(row("a"), row("b"))
    assert fingerprint(row("a"), row("b", source="other")) == same
    assert (
        len({same, fingerprint(row("a")), fingerprint(row("b"), row("a")), fingerprint(row("a"), row("b", "?"))}) == 4
    )
