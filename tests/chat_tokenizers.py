"""Tiny byte-level tokenizers built on the spot, with chat templates of the kinds that models ship."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

# Like Qwen3's: thinking is kept in the answers after the last question (an empty one where there is none) and
# stripped from earlier answers.
THINKING_TEMPLATE = """
{%- set last = namespace(question=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set text = m.content -%}
{%- if m.role == 'assistant' -%}
    {%- set thought = m.reasoning_content | default('') -%}
    {%- if '</think>' in text -%}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if loop.index0 > last.question -%}
        {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text -%}
    {%- endif -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Like that of Qwen3-Thinking-2507, which is Qwen3's but for the end of a prompt: the model begins inside its thinking.
OPENING_TEMPLATE = THINKING_TEMPLATE.replace("assistant\\n' -}}", "assistant\\n<think>\\n' -}}")

# Renders every turn as it stands.
PLAIN_TEMPLATE = """
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")


def write_tokenizer(
    directory: Path,
    template: str | None = THINKING_TEMPLATE,
    *,
    think_tokens: Sequence[str] = THINK_TOKENS,
    control_tokens: Sequence[str] = CONTROL_TOKENS,
    eos: str = "<|endoftext|>",
) -> Path:
    """Write a byte-level BPE tokenizer's files; merges span line breaks, as in real vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(control_tokens),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\n\n\n what is the sum of two and two\n\n"] * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in think_tokens])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": 1000}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
