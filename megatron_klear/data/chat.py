"""Conversations to token ids through a tokenizer's chat template, and which of those tokens the assistant wrote.

A turn's tokens are what the model would have produced after the generation prompt: the text is cut where the
generation prompt ends and the two sides are tokenized apart, as they are at rollout time, so no token ever spans the
border and the prompt's tokens are a prefix of the conversation's by construction.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.end_tokens import end_ids
from megatron_klear.data.problems import Problems
from megatron_klear.data.rows import Message
from megatron_klear.errors import DataError
from megatron_klear.records import IntArray

_UNUSUAL = "Zz\u00e9\u0416\u4e2d\u0e01\u2211\U0001f600\U000e0001\t"
"""Characters of many scripts; a tokenizer that keeps all of them keeps any."""

_SHOWN_CHARACTERS = 60
"""Of a text in a message."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class ConversationError(DataError):
    """A conversation that the chat template cannot turn into something to train on; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """A stretch of a rendered conversation; `trained` if the assistant wrote it."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedConversation:
    """A conversation as tokens, ending with the last token to train on.

    Attributes:
        token_ids: int32 [L].
        trained_spans: (start, end) of each run of assistant tokens, the end-of-turn token included; never holds 0.
    """

    token_ids: NDArray[np.int32]
    trained_spans: tuple[tuple[int, int], ...]


class ChatTokenizer:
    """A Hugging Face tokenizer whose chat template has been found fit for training.

    Use `load_chat_tokenizer`.

    Attributes:
        end_of_turn: text of the token that closes an assistant turn.
        end_of_turn_id: its id.
        opening: what every generation prompt ends with from a think marker on that it opens and does not close, such
            as "<think>\\n"; mostly empty. It belongs to a response's text, and the response's tokens do not hold it.
        think_start_id, think_end_id: ids of the think markers.
        stop_ids: ids that end a response, at rollout time as in evaluations and at every engine: end of turn, the
            tokenizer's end of text, the model's own (see `end_ids`), and those asked for.
        pad_token_id: a valid id for padding.
        num_tokens: one above the largest id.
        markers: control tokens of the template; text that holds one would break the turn structure.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        think_start: str,
        think_end: str,
        stop_tokens: Sequence[str] = (),
        model_ends: Sequence[int] = (),
        directory: str = "",
    ) -> None:
        self.hf = tokenizer
        self.think_start, self.think_end = think_start, think_end
        problems = Problems(f"the tokenizer of tokenizer.dir = {directory}")
        self.num_tokens = 1 + max(tokenizer.get_vocab().values())
        self.think_start_id = self._single_token("tokenizer.think_start", think_start, problems)
        self.think_end_id = self._single_token("tokenizer.think_end", think_end, problems)
        if not tokenizer.chat_template:
            problems.add("chat template", "there is none, so turns cannot be told apart; use a chat model's tokenizer")
        try:
            # Byte-level tokenizers, as Qwen3's, can spell everything: nothing to look for in every text.
            self._keeps_all = self.decode(self.encode(_UNUSUAL)) == _UNUSUAL
        except Exception as error:  # what its Rust code raises is nothing more special
            problems.add("characters", f"it fails on characters that it has no token for: {error}")
        known = tokenizer.get_vocab()
        for token in stop_tokens:
            if token not in known:
                problems.add("rollout.stop_tokens", f"{token!r} is not one token of this tokenizer")
        beyond = [i for i in model_ends if i >= self.num_tokens]
        if beyond:
            text = f"the model ends responses at ids {beyond} (eos_token_id), and the tokenizer has {self.num_tokens}"
            problems.add("model.hf_dir", text)
        problems.raise_if_any()
        self.end_of_turn = self.opening = ""
        self.markers: tuple[str, ...] = ()
        self._probe(problems)
        problems.raise_if_any()
        self.end_of_turn_id = self._known_id(self.end_of_turn)
        eos = tokenizer.eos_token_id
        more = [*model_ends, *(int(known[token]) for token in stop_tokens)]
        self.stop_ids = tuple(dict.fromkeys(i for i in (self.end_of_turn_id, eos, *more) if i is not None))
        pad = tokenizer.pad_token_id
        self.pad_token_id = int(self.end_of_turn_id if pad is None else pad)

    def encode(self, text: str) -> IntArray:
        """Tokenize text as it stands, adding nothing; int64 [L]."""
        return np.array(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    def decode(self, token_ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Text of token ids, markers included."""
        ids = [int(i) for i in token_ids]
        return str(self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def response_text(self, response_ids: Sequence[int] | NDArray[np.integer]) -> str:
        """A response as it is graded, kept and shown: with what the prompt opened, without the token that ended it.

        To the letter: a template that writes an answer as it stands renders prompt and response of this text again.
        """
        ended = len(response_ids) > 0 and int(response_ids[-1]) in self.stop_ids
        return self.opening + self.decode(response_ids[:-1] if ended else response_ids)

    def encode_prompt(self, messages: Sequence[Message]) -> IntArray:
        """Tokenize a conversation up to and including the generation prompt; int64 [L].

        Raises:
            ConversationError: the template refuses the conversation, or a message holds one of its markers or
                characters that the tokenizer has no token for.
        """
        self._refuse_markers(messages)
        text = self._render(messages, prompt=True)
        token_ids = self.encode(text)
        self._refuse_losses(text, token_ids)
        return token_ids

    def encode_conversations(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[EncodedConversation | ConversationError]:
        """Tokenize conversations that end with an assistant turn; an error stands in the place of one that cannot be.

        Trained are the last turn, and earlier turns whose text in the whole conversation is what the model would have
        said at that point. Templates that strip the thinking from earlier turns (as Qwen3's) leave only the last one.
        """
        answers: list[list[TextSpan] | ConversationError] = []
        for messages in conversations:
            try:
                answers.append(self.spans(messages))
            except ConversationError as error:
                answers.append(error)
        texts = [span.text for spans in answers if isinstance(spans, list) for span in spans]
        tokens = iter(self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        return [
            answer if isinstance(answer, ConversationError) else self._encoded(answer, [next(tokens) for _ in answer])
            for answer in answers
        ]

    def _encoded(
        self, spans: Sequence[TextSpan], tokens: Sequence[Sequence[int]]
    ) -> EncodedConversation | ConversationError:
        try:
            for span, ids in zip(spans, tokens, strict=True):
                self._refuse_losses(span.text, ids)
        except ConversationError as error:
            return error
        return _joined([(ids, span.trained) for span, ids in zip(spans, tokens, strict=True)])

    def spans(self, messages: Sequence[Message]) -> list[TextSpan]:
        """Cut the rendered conversation into what the assistant wrote and what it did not, up to its last token.

        Raises:
            ConversationError: the template refuses the conversation, marks no assistant turn in it, or leaves out a
                part of an answer that would be trained.
        """
        self._refuse_markers(messages)
        whole = self._render(messages)
        cuts: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = number == len(messages) - 1
            prompt = self._render(messages[:number], prompt=True)
            answered = whole if is_last else self._render(messages[: number + 1])
            end = answered.rfind(self.end_of_turn) + len(self.end_of_turn)
            if answered.startswith(prompt) and whole.startswith(answered[:end]) and end > len(prompt):
                self._refuse_omissions(message, self.opening + whole[len(prompt) : end])
                cuts.append((len(prompt), end))
            elif is_last:
                raise ConversationError("the chat template renders the last answer without its generation prompt")
        spans, position = [], 0
        for start, end in cuts:
            spans.append(TextSpan(text=whole[position:start], trained=False))
            spans.append(TextSpan(text=whole[start:end], trained=True))
            position = end
        return spans

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template is a program from outside
            raise ConversationError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _refuse_markers(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            for text in (message["content"], message.get("reasoning_content", "")):
                found = [m for m in self.markers if m in text]
                if found:
                    raise ConversationError(
                        f"message {number} holds the chat marker {found[0]}, which would end its turn"
                    )

    def _refuse_omissions(self, message: Message, rendered: str) -> None:
        """Refuse an answer of which the template leaves out a part without a word.

        Qwen3's, for one, keeps the first and the last of what stands between the think markers, and nothing that stands
        before them; others do not know `reasoning_content`.
        """
        markers = f"{re.escape(self.think_start)}|{re.escape(self.think_end)}"
        position = 0
        for text in (message.get("reasoning_content", ""), message["content"]):
            for part in map(str.strip, re.split(markers, text)):
                at = rendered.find(part, position)
                if at < 0:
                    shown = part if len(part) <= _SHOWN_CHARACTERS else f"{part[:_SHOWN_CHARACTERS]} ..."
                    raise ConversationError(
                        f"the chat template leaves out a part of the answer, {shown!r}: a thinking part belongs at the "
                        f"beginning, between one {self.think_start} and one {self.think_end}"
                    )
                position = at + len(part)

    def _refuse_losses(self, text: str, token_ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Refuse text with characters that have no token, which some tokenizers pass over without a word."""
        if self._keeps_all:
            return
        lost = sorted(_characters(text) - _characters(self.decode(token_ids)))
        if lost:
            shown = " ".join(repr(char) for char in lost[:8]) + (" ..." if len(lost) > 8 else "")
            raise ConversationError(f"the tokenizer of tokenizer.dir has no token for {shown}")

    def _single_token(self, setting: str, marker: str, problems: Problems) -> int:
        ids = self.hf(marker, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != self.hf.unk_token_id:
            return int(ids[0])
        problems.add(setting, f"{marker!r} must be a single token of this tokenizer, it is {len(ids)}: {list(ids)}")
        return -1

    def _known_id(self, token: str) -> int:
        return int(self.hf.convert_tokens_to_ids(token))

    def _probe(self, problems: Problems) -> None:
        """Render a small conversation and learn the template's markers from it, or what is wrong with the template."""
        where = "chat template"
        asked = [{"role": "user", "content": "why?"}]
        thinking, answer = "because", "so."
        reply = f"{self.think_start}\n{thinking}\n{self.think_end}\n\n{answer}"
        try:
            prompt = self._render(asked, prompt=True)
            whole = self._render([*asked, {"role": "assistant", "content": reply}])
        except ConversationError as error:
            problems.add(where, str(error))
            return
        if not prompt.startswith(self._render(asked)) or len(prompt) == len(self._render(asked)):
            problems.add(where, "it has no generation prompt, so assistant turns are not marked")
            return
        if not whole.startswith(prompt):
            problems.add(where, f"it renders an answered turn without its generation prompt {prompt[-40:]!r}")
            return
        self.opening = self._left_open(prompt[len(self._render(asked)) :])
        written = whole[len(prompt) :]
        if thinking not in written or self.think_end not in written:
            problems.add(where, "it drops the thinking part of the last answer, which could then not be trained")
            return
        specials = self._control_tokens()
        tail = written[written.rindex(answer) + len(answer) :]
        closing = [token for token in specials if tail.startswith(token)]
        if not closing:
            problems.add(where, f"it does not close an assistant turn with a control token, but with {tail!r}")
            return
        self.end_of_turn = max(closing, key=len)
        self.markers = tuple(sorted(token for token in specials if token in whole))
        pieces = [*self.encode(prompt), *self.encode(written)]
        if pieces != list(self.encode(whole)):
            problems.add(where, "text tokenizes differently when it is cut at the generation prompt")

    def _left_open(self, generation_prompt: str) -> str:
        at = generation_prompt.rfind(self.think_start)
        return "" if at < 0 or self.think_end in generation_prompt[at:] else generation_prompt[at:]

    def _control_tokens(self) -> list[str]:
        """Added tokens that text is always cut at, but for the think markers."""
        added = [str(token) for token in self.hf.added_tokens_decoder.values()]
        tokens = dict.fromkeys([*self.hf.all_special_tokens, *added])
        return [token for token in tokens if token and token not in (self.think_start, self.think_end)]


def load_chat_tokenizer(
    directory: str | Path,
    *,
    think_start: str = "<think>",
    think_end: str = "</think>",
    stop_tokens: Sequence[str] = (),
    model_dir: str | Path | None = None,
    vocab_size: int | None = None,
) -> ChatTokenizer:
    """Load a tokenizer from a directory and check that its conversations can be trained on.

    Args:
        directory: Hugging Face tokenizer directory (tokenizer.dir); nothing is downloaded.
        think_start, think_end: think markers (tokenizer.think_start, tokenizer.think_end).
        stop_tokens: texts of tokens that also end a response (rollout.stop_tokens).
        model_dir: Hugging Face directory of the model (model.hf_dir), whose end tokens end a response, too.
        vocab_size: rows of the model's embedding, if known; the tokenizer must not go beyond it.

    Raises:
        DataError: the directory holds no usable tokenizer, a think marker or stop token is not a single token, the
            chat template does not mark assistant turns, or the model's end tokens cannot be read or are not in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise DataError(f"tokenizer.dir = {directory}: there is no such directory")
    missing = [name for name in _TOKENIZER_FILES if not (path / name).is_file()]
    if missing:
        raise DataError(f"tokenizer.dir = {directory}: {' and '.join(missing)} not found there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the library raise
        raise DataError(f"tokenizer.dir = {directory}: the tokenizer cannot be loaded: {error}") from error
    chat = ChatTokenizer(
        tokenizer,
        think_start=think_start,
        think_end=think_end,
        stop_tokens=stop_tokens,
        model_ends=() if model_dir is None else end_ids(model_dir),
        directory=str(directory),
    )
    if vocab_size is not None and chat.num_tokens > vocab_size:
        raise DataError(
            f"tokenizer.dir = {directory}: its largest token id is {chat.num_tokens - 1}, but the model has "
            f"{vocab_size} embeddings; set model.vocab_size to at least {chat.num_tokens} or take the model's tokenizer"
        )
    return chat


def _characters(text: str) -> set[str]:
    """The characters of a text but for spaces, without regard to case and Unicode variants."""
    return {char for char in unicodedata.normalize("NFKC", text).casefold() if not char.isspace()}


def _joined(pieces: Sequence[tuple[Sequence[int], bool]]) -> EncodedConversation:
    ids, spans, position = [np.asarray(tokens, dtype=np.int32) for tokens, _ in pieces], [], 0
    for tokens, (_, trained) in zip(ids, pieces, strict=True):
        if trained:
            spans.append((position, position + len(tokens)))
        position += len(tokens)
    return EncodedConversation(token_ids=np.concatenate(ids), trained_spans=tuple(spans))
