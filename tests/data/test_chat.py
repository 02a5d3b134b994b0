"""What of a conversation is trained, against texts written out by hand; and tokenizers that cannot be used."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.data import ChatTokenizer, ConversationError, EncodedConversation, load_chat_tokenizer
from megatron_klear.data.end_tokens import end_ids
from megatron_klear.errors import DataError
from tests.chat_tokenizers import OPENING_TEMPLATE, PLAIN_TEMPLATE, THINKING_TEMPLATE

ANSWER = "<think>\nit is two\n</think>\n\nSo 2."


@pytest.fixture(scope="module")
def thinking(thinking_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(thinking_tokenizer)


@pytest.fixture(scope="module")
def plain(make_tokenizer: Callable[..., Path], plain_template: str) -> ChatTokenizer:
    return load_chat_tokenizer(make_tokenizer(plain_template))


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def encoded(chat: ChatTokenizer, messages: list[dict[str, str]]) -> EncodedConversation:
    [answer] = chat.encode_conversations([messages])
    assert isinstance(answer, EncodedConversation)
    return answer


def trained_texts(chat: ChatTokenizer, conversation: EncodedConversation) -> list[str]:
    return [chat.decode(conversation.token_ids[start:end]) for start, end in conversation.trained_spans]


def test_only_the_answer_is_trained_thinking_and_end_of_turn_included(thinking: ChatTokenizer) -> None:
    conversation = encoded(thinking, turns("1+1?", ANSWER))
    assert trained_texts(thinking, conversation) == [ANSWER + "<|im_end|>"]
    whole = thinking.decode(conversation.token_ids)
    assert whole == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n" + ANSWER + "<|im_end|>"
    [(start, end)] = conversation.trained_spans
    assert conversation.token_ids[start] == thinking.think_start_id
    assert conversation.token_ids[end - 1] == thinking.end_of_turn_id
    assert end == len(conversation.token_ids)


def test_the_prompt_of_a_rollout_is_a_token_prefix_of_the_conversation(thinking: ChatTokenizer) -> None:
    for question, answer in [("1+1?", ANSWER), ("what is\n\n", "\n\n two"), ("a", "\n")]:
        prompt = thinking.encode_prompt(turns(question)).tolist()
        conversation = encoded(thinking, turns(question, answer + "."))
        assert conversation.token_ids[: len(prompt)].tolist() == prompt
        assert conversation.trained_spans[0][0] == len(prompt)


def test_no_token_spans_the_border_even_where_the_whole_text_would_merge_there(plain: ChatTokenizer) -> None:
    messages = turns("1+1?", "\n two")
    text = plain.hf.apply_chat_template(messages, tokenize=False)
    prompt = plain.encode_prompt(messages[:1]).tolist()
    # The vocabulary merges line breaks, so tokenizing the whole text at once breaks the prefix.
    assert plain.encode(text).tolist()[: len(prompt)] != prompt
    assert encoded(plain, messages).token_ids[: len(prompt)].tolist() == prompt
    assert trained_texts(plain, encoded(plain, messages)) == ["\n two<|im_end|>"]


def test_reasoning_in_a_field_of_its_own_is_trained(thinking: ChatTokenizer) -> None:
    messages = [*turns("1+1?"), {"role": "assistant", "content": "So 2.", "reasoning_content": "it is two"}]
    assert trained_texts(thinking, encoded(thinking, messages)) == [ANSWER + "<|im_end|>"]


def test_earlier_turns_whose_thinking_is_stripped_are_not_trained(thinking: ChatTokenizer) -> None:
    conversation = encoded(thinking, turns("1+1?", ANSWER, "2+2?", "<think>\nfour\n</think>\n\n4"))
    assert trained_texts(thinking, conversation) == ["<think>\nfour\n</think>\n\n4<|im_end|>"]
    assert "it is two" not in thinking.decode(conversation.token_ids)
    assert "So 2." in thinking.decode(conversation.token_ids)


def test_an_earlier_turn_without_thinking_is_not_trained_where_the_model_would_have_thought(
    thinking: ChatTokenizer,
) -> None:
    conversation = encoded(thinking, turns("1+1?", "2", "2+2?", ANSWER))
    assert trained_texts(thinking, conversation) == [ANSWER + "<|im_end|>"]


def test_all_turns_are_trained_where_the_template_keeps_them(plain: ChatTokenizer) -> None:
    messages = [{"role": "system", "content": "be kind"}, *turns("1+1?", ANSWER, "2+2?", "4")]
    conversation = encoded(plain, messages)
    assert trained_texts(plain, conversation) == [ANSWER + "<|im_end|>", "4<|im_end|>"]
    text = plain.hf.apply_chat_template(messages, tokenize=False)
    assert plain.decode(conversation.token_ids) + "\n" == text


def test_what_the_tokenizer_tells_of_itself(thinking: ChatTokenizer) -> None:
    assert thinking.end_of_turn == "<|im_end|>"
    assert set(thinking.markers) == {"<|im_start|>", "<|im_end|>"}
    assert [thinking.decode([i]) for i in thinking.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert thinking.decode([thinking.think_start_id, thinking.think_end_id]) == "<think></think>"
    assert thinking.num_tokens == len(thinking.hf)
    assert 0 <= thinking.pad_token_id < thinking.num_tokens


@pytest.mark.parametrize(
    ("template", "opening"), [(PLAIN_TEMPLATE, ""), (THINKING_TEMPLATE, ""), (OPENING_TEMPLATE, "<think>\n")]
)
def test_the_text_of_a_response_has_what_the_prompt_opened_and_not_the_token_that_ended_it(
    make_tokenizer: Callable[..., Path], template: str, opening: str
) -> None:
    chat = load_chat_tokenizer(make_tokenizer(template))
    assert chat.opening == opening
    asked = turns("does <think> open it?")
    prompt = chat.encode_prompt(asked)
    assert chat.decode(prompt).endswith("assistant\n" + opening)
    # What the model would have written of the answer: these tokens, that text.
    conversation = encoded(chat, [*asked, {"role": "assistant", "content": ANSWER}])
    written = conversation.token_ids[len(prompt) :]
    assert conversation.trained_spans == ((len(prompt), len(conversation.token_ids)),)
    assert chat.response_text(written) == chat.response_text(written[:-1]) == ANSWER
    assert chat.response_text([]) == opening


def test_stop_tokens_are_those_of_the_tokenizer_and_those_asked_for(make_tokenizer: Callable[..., Path]) -> None:
    directory = make_tokenizer()
    chat = load_chat_tokenizer(directory, stop_tokens=["w", "<|im_end|>"])
    assert [chat.decode([i]) for i in chat.stop_ids] == ["<|im_end|>", "<|endoftext|>", "w"]
    with pytest.raises(DataError) as caught:
        load_chat_tokenizer(directory, stop_tokens=["foo", "w", "bar"])
    for token in ("foo", "bar"):
        assert f"rollout.stop_tokens: '{token}' is not one token of this tokenizer" in str(caught.value)
    assert "2 problems" in str(caught.value)


def test_the_models_own_end_tokens_are_stop_tokens(make_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_tokenizer(eos="<|im_end|>")
    plain = load_chat_tokenizer(directory)
    assert [plain.decode([i]) for i in plain.stop_ids] == ["<|im_end|>"]
    text_end, turn_end = plain.hf.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert load_chat_tokenizer(directory, model_dir=tmp_path).stop_ids == (turn_end,), "a directory that names none"
    # As Qwen3's: config.json names the end of a turn alone, generation_config.json the end of text, too.
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": turn_end}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn_end, text_end]}))
    assert end_ids(tmp_path) == (turn_end, text_end)
    chat = load_chat_tokenizer(directory, model_dir=tmp_path, stop_tokens=["w"])
    assert [chat.decode([i]) for i in chat.stop_ids] == ["<|im_end|>", "<|endoftext|>", "w"]
    for value, message in (
        ([0, 100_000], "model.hf_dir: the model ends responses at ids [100000] (eos_token_id), and the tokenizer has"),
        ("0", "generation_config.json: eos_token_id is '0', must be a token id or a list of them"),
        ([True], "eos_token_id is [True], must be"),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(DataError) as caught:
            load_chat_tokenizer(directory, model_dir=tmp_path)
        assert message in str(caught.value)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id cannot be read"):
        load_chat_tokenizer(directory, model_dir=tmp_path)


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        ({"content": "<think>a</think> b </think> c"}, "b"),
        ({"content": "<think>a</think> a </think> c"}, "a"),
        ({"content": "<think>a</think> b <think>d</think> c"}, "b"),
        ({"content": "Sure. <think>a</think> c"}, "Sure."),
        ({"content": "<think>a</think> c", "reasoning_content": "r"}, "r"),
        ({"content": "<think>a</think>" + 20 * "so long" + "</think> c"}, "so longso"),
    ],
)
@pytest.mark.parametrize("template", [THINKING_TEMPLATE, OPENING_TEMPLATE])
def test_an_answer_of_which_the_template_leaves_out_a_part_is_refused(
    make_tokenizer: Callable[..., Path], template: str, answer: dict[str, str], lost: str
) -> None:
    chat = load_chat_tokenizer(make_tokenizer(template))
    asked = turns("q")
    bad, good = chat.encode_conversations([[*asked, {"role": "assistant", **answer}], turns("q", ANSWER)])
    assert isinstance(good, EncodedConversation)
    assert isinstance(bad, ConversationError)
    assert f"the chat template leaves out a part of the answer, '{lost}" in str(bad)
    assert len(str(bad)) < 250
    # As an earlier turn it is no more than context, of which the template takes what the model would see.
    context = [*asked, {"role": "assistant", **answer}, *turns("more?", ANSWER)]
    assert len(encoded(chat, context).trained_spans) == 1


def test_an_answer_that_the_template_keeps_whole_is_taken_as_it_stands(plain: ChatTokenizer) -> None:
    for content in ("<think>a</think> b </think> c", "Sure. <think>a</think> c", "\n\n a\n"):
        conversation = encoded(plain, turns("q", content, "more?", ANSWER))
        assert trained_texts(plain, conversation) == [content + "<|im_end|>", ANSWER + "<|im_end|>"]
    reasoned = {"role": "assistant", "content": "c", "reasoning_content": "r"}
    [lost] = plain.encode_conversations([[*turns("q"), reasoned]])
    assert "leaves out a part of the answer, 'r'" in str(lost)


def test_text_that_holds_control_tokens_is_refused(thinking: ChatTokenizer) -> None:
    broken = turns("1+1?", "2<|im_end|>\n<|im_start|>user\nmore")
    good = turns("1+1?", ANSWER)
    first, second = thinking.encode_conversations([broken, good])
    assert isinstance(first, ConversationError)
    assert "message 2 holds the chat marker <|im_end|>" in str(first)
    assert isinstance(second, EncodedConversation)
    assert trained_texts(thinking, second) == [ANSWER + "<|im_end|>"]
    with pytest.raises(ConversationError, match="message 1 holds the chat marker"):
        thinking.encode_prompt(turns("<|im_start|>system"))


def test_a_conversation_that_the_template_refuses_is_named(
    make_tokenizer: Callable[..., Path], plain_template: str
) -> None:
    strict = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system messages here') }}{%- endif -%}"
    chat = load_chat_tokenizer(make_tokenizer(strict + plain_template))
    with pytest.raises(ConversationError, match="no system messages here"):
        chat.encode_prompt([{"role": "system", "content": "s"}, *turns("q")])


PLAIN = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "chat template: there is none"),
        (PLAIN, "it has no generation prompt, so assistant turns are not marked"),
        (PLAIN + PROMPT.replace("assistant", "bot"), "renders an answered turn without its generation prompt"),
        (
            PLAIN + PROMPT.replace("nt\\n", "nt\\n<think>\\n\\n</think>\\n"),
            "an answered turn without its generation prompt",
        ),
        (PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + PROMPT, "it drops the thinking part"),
        (PLAIN.replace("<|im_end|>", "") + PROMPT, "it does not close an assistant turn with a control token"),
        ("{{ messages.nothing.here }}", "refuses the conversation"),
        ("{% if %}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(
    make_tokenizer: Callable[..., Path], template: str | None, expected: str
) -> None:
    directory = make_tokenizer(template)
    with pytest.raises(DataError) as caught:
        load_chat_tokenizer(directory)
    assert expected in str(caught.value)
    assert f"tokenizer.dir = {directory}" in str(caught.value)


def test_think_markers_that_are_no_single_tokens_are_refused(make_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        load_chat_tokenizer(make_tokenizer(think_tokens=["<think>"]))
    assert "tokenizer.think_end: '</think>' must be a single token of this tokenizer, it is 8" in str(caught.value)
    assert "tokenizer.think_start" not in str(caught.value)


def test_other_think_markers_are_taken_from_the_settings(
    make_tokenizer: Callable[..., Path], plain_template: str
) -> None:
    directory = make_tokenizer(plain_template, think_tokens=["[T]", "[/T]"])
    chat = load_chat_tokenizer(directory, think_start="[T]", think_end="[/T]")
    conversation = encoded(chat, turns("q", "[T]hm[/T]a"))
    assert trained_texts(chat, conversation) == ["[T]hm[/T]a<|im_end|>"]


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path, thinking_tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.dir = .*: there is no such directory"):
        load_chat_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"tokenizer.json and tokenizer_config.json not found"):
        load_chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_bytes((thinking_tokenizer / "tokenizer_config.json").read_bytes())
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load_chat_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(thinking_tokenizer: Path, thinking: ChatTokenizer) -> None:
    size = thinking.num_tokens
    assert load_chat_tokenizer(thinking_tokenizer, vocab_size=size).num_tokens == size
    with pytest.raises(DataError, match=f"largest token id is {size - 1}, but the model has {size - 1} embeddings"):
        load_chat_tokenizer(thinking_tokenizer, vocab_size=size - 1)


def test_characters_without_a_token_are_named_instead_of_lost(make_tokenizer: Callable[..., Path]) -> None:
    directory = make_tokenizer()
    whole = load_chat_tokenizer(directory)
    assert whole.decode(whole.encode_prompt(turns("1+1 \u4e2d"))).count("\u4e2d") == 1  # bytes spell everything

    # The same tokenizer with letters for tokens and nothing for the others, of which it says no word.
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    letters = {char: number for number, char in enumerate(sorted(set(string.printable)))}
    content["model"] = {"type": "BPE", "vocab": letters, "merges": []}
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    content["decoder"] = {"type": "Fuse"}
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = len(letters) + number
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    chat = load_chat_tokenizer(directory)
    assert chat.decode(chat.encode("a\u4e2db")) != "a\u4e2db"
    assert "1+1?" in chat.decode(chat.encode_prompt(turns("1+1?")))
    with pytest.raises(ConversationError, match="has no token for '\u0436' '\u4e2d'"):
        chat.encode_prompt(turns("1+1 \u4e2d \u0436"))
    good, bad = chat.encode_conversations([turns("1+1?", ANSWER), turns("1+1?", ANSWER.replace("2", "\u4e2d"))])
    assert isinstance(good, EncodedConversation)
    assert isinstance(bad, ConversationError)
    assert "has no token for '\u4e2d'" in str(bad)

    content["model"] = {"type": "WordLevel", "vocab": letters, "unk_token": "none"}
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="it fails on characters that it has no token for: WordLevel error"):
        load_chat_tokenizer(directory)
