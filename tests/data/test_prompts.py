"""Prompt files to prompts, and held-out problems kept apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.data import ChatTokenizer, SftIndex, load_chat_tokenizer, load_prompts, require_disjoint, text_key
from megatron_klear.errors import DataError

Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def chat(thinking_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(thinking_tokenizer)


def row(row_id: str, question: str = "1+1?", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": question}]
    return {"id": row_id, "domain": "math", "messages": messages, "reference": "2", **changes}


def test_prompts_end_with_the_generation_prompt(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    data = load_prompts(
        [write_jsonl(row("a"), row("b", domain="code", reference='["assert f(1) == 2"]'))], chat, max_prompt_tokens=500
    )
    first, second = data.prompts
    assert chat.decode(first.token_ids) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first.token_ids.dtype == np.int64
    assert (first.prompt_id, first.domain, first.reference, first.text) == ("a", "math", "2", "1+1?")
    assert (second.domain, second.reference) == ("code", '["assert f(1) == 2"]')
    assert len(data) == 2


def test_long_prompts_are_refused_or_dropped_and_counted(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    path = write_jsonl(row("short"), row("long", "x" * 300), row("longer", "x" * 400))
    lengths = [len(p.token_ids) for p in load_prompts([path], chat, max_prompt_tokens=1000).prompts]
    with pytest.raises(DataError) as caught:
        load_prompts([path], chat, max_prompt_tokens=200)
    text = str(caught.value)
    assert f"{path}:2: prompt long has {lengths[1]} tokens, data.max_prompt_tokens = 200" in text
    assert f"{path}:3: prompt longer has {lengths[2]} tokens" in text
    assert f"data.max_prompt_tokens to at least {lengths[2]}" in text
    assert "data.oversize=drop" in text
    data = load_prompts([path], chat, max_prompt_tokens=lengths[1], oversize="drop")
    assert [p.prompt_id for p in data.prompts] == ["short", "long"]
    assert data.dropped_ids == ("longer",)
    with pytest.raises(DataError, match=r"all 3 prompts are over data\.max_prompt_tokens = 3 tokens"):
        load_prompts([path], chat, max_prompt_tokens=3, oversize="drop")


def test_prompts_with_control_tokens_are_named(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    path = write_jsonl(row("a"), row("b", "<|im_end|>"))
    with pytest.raises(DataError, match=r":2: message 2 holds the chat marker"):
        load_prompts([path], chat, max_prompt_tokens=500)


def test_the_fingerprint_covers_references(chat: ChatTokenizer, write_jsonl: Writer) -> None:
    prints = {
        load_prompts([write_jsonl(row("a", reference=reference))], chat, max_prompt_tokens=500).fingerprint
        for reference in ("2", "3")
    }
    assert len(prints) == 2


def test_heldout_problems_may_not_be_trained_on_however_they_are_spelled(
    chat: ChatTokenizer, write_jsonl: Writer, make_index: Callable[..., SftIndex]
) -> None:
    heldout = load_prompts(
        [write_jsonl(row("h1", "What is 1 + 1?"), row("h2", "x²?"), row("h3", "fine"))], chat, max_prompt_tokens=500
    )
    prompts = load_prompts(
        [write_jsonl(row("p1", "  what IS\n1 + 1?"), row("p2", "other"))], chat, max_prompt_tokens=500
    )
    turns = ["x2?", "<think>\n\n</think>\n\na", "more", "<think>\n\n</think>\n\nb"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    sft = make_index(write_jsonl({"id": "s1", "messages": messages}))
    with pytest.raises(DataError) as caught:
        require_disjoint(heldout.keys(), {"data.prompts": prompts.keys(), "data.sft": sft.keys()})
    text = str(caught.value)
    assert text.startswith("2 problems with data.heldout")
    assert "data.prompts p1: the same problem as held-out h1" in text
    assert "data.sft s1: the same problem as held-out h2" in text
    assert "p2" not in text


def test_disjoint_data_pass_and_keys_see_more_than_case_and_spacing() -> None:
    require_disjoint([("h", text_key("1 + 1?"))], {"data.prompts": [("p", text_key("1 + 2?"))]})
    assert text_key("a b") != text_key("ab")
    assert text_key("A\u00a0 b\n") == text_key("a b")
