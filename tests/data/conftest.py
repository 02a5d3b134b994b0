"""Tiny tokenizers, and indexes of a few rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.data import SftIndex, describe_source, prepare_index
from tests.chat_tokenizers import PLAIN_TEMPLATE, THINKING_TEMPLATE, write_tokenizer

TokenizerMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def thinking_template() -> str:
    return THINKING_TEMPLATE


@pytest.fixture(scope="session")
def plain_template() -> str:
    return PLAIN_TEMPLATE


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerMaker:
    """Writes a tokenizer's directory; arguments are those of `write_tokenizer`."""

    def make(template: str | None = THINKING_TEMPLATE, **options: Any) -> Path:
        return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **options)

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
