"""Tiny tokenizers built on the spot, with chat templates of the kinds that models ship."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klear.data import SftIndex, describe_source, prepare_index

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

# Renders every turn as it stands.
PLAIN_TEMPLATE = """
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]

TokenizerMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def thinking_template() -> str:
    return THINKING_TEMPLATE


@pytest.fixture(scope="session")
def plain_template() -> str:
    return PLAIN_TEMPLATE


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerMaker:
    """Builds a byte-level BPE tokenizer directory; merges span line breaks, as in real vocabularies."""

    def make(
        template: str | None = THINKING_TEMPLATE,
        *,
        think_tokens: list[str] = THINK_TOKENS,
        control_tokens: list[str] = CONTROL_TOKENS,
        eos: str = "<|endoftext|>",
    ) -> Path:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=control_tokens,
            show_progress=False,
        )
        tokenizer.train_from_iterator(["\n\n\n\n what is the sum of two and two\n\n"] * 4, trainer)
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in think_tokens])
        directory = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": 1000}
        if template is not None:
            settings["chat_template"] = template
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return directory

    return make


@pytest.fixture(scope="session")
def thinking_tokenizer(make_tokenizer: TokenizerMaker) -> Path:
    return make_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or lines as they stand) to a file."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_index(thinking_tokenizer: Path, tmp_path: Path) -> Callable[..., SftIndex]:
    """Tokenizes files in this process and opens their index; keywords are those of `prepare_index`."""

    def make(*paths: Path, processes: int = 1, index_dir: Path = tmp_path / "index", **options: int) -> SftIndex:
        source = describe_source(
            [str(path) for path in paths], str(thinking_tokenizer), "<think>", "</think>", index_dir=str(index_dir)
        )
        prepare_index(source, processes=processes, **options)
        return SftIndex(source.directory)

    return make
