"""One part of the input into one part of the index; what a tokenizer process does.

A part is written beside its final place and renamed when it is whole, with the digests of its files in it: whatever is
found under the final name and has these digests is finished work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_klear.data.chat import ChatTokenizer, ConversationError, EncodedConversation, load_chat_tokenizer
from megatron_klear.data.index import files
from megatron_klear.data.index.files import IndexSource, digest_of, index_prefix, write_rejects
from megatron_klear.data.index.parts import LINE_BYTES, Part, read_part
from megatron_klear.data.overlap import text_key
from megatron_klear.data.rows import SftRow, parse_sft_row
from megatron_klear.errors import DataError

DONE = "done.json"

_CHARACTERS_AT_A_TIME = 1_000_000
"""Text that is tokenized in one call: the tokenizer's answer, Python numbers, takes some fifty bytes a character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartJob:
    """A part to tokenize: its number, its stretch of the input, and the longest line to read, in bytes."""

    number: int
    part: Part
    source: IndexSource
    line_bytes: int = LINE_BYTES

    @property
    def directory(self) -> Path:
        """Where the finished part lies."""
        return self.source.directory / files.PARTS / f"{self.number:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCounts:
    """What a finished part holds: lines of input, conversations, rejected rows."""

    lines: int
    rows: int
    rejected: int


def do_part(job: PartJob) -> PartCounts:
    """Make a part unless it is there and whole.

    Raises:
        DataError: the input cannot be read.
        OSError: the part cannot be written.
    """
    return finished_part(job.directory) or _make_part(job)


def finished_part(directory: Path) -> PartCounts | None:
    """Counts of a part that is finished, its content compared with the digests noted in it; else None."""
    try:
        done = json.loads((directory / DONE).read_text(encoding="utf-8"))
        if all(digest_of(directory / name) == digest for name, digest in done["digests"].items()):
            return PartCounts(lines=done["lines"], rows=done["rows"], rejected=done["rejected"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _make_part(job: PartJob) -> PartCounts:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    fresh = job.directory.with_suffix(f".{os.getpid()}")
    for leftover in (fresh, job.directory):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    chat = _tokenizer(job.source.tokenizer_dir, job.source.think_start, job.source.think_end)
    rejects: list[tuple[str, int, str]] = []
    prefix = index_prefix(fresh, files.CONVERSATIONS)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    name = job.source.files[job.part.file]
    lines = _Lines(job, rejects, name)
    kept: list[dict[str, Any]] = []
    for line, row, encoded in _encoded(lines, chat, rejects, name):
        pieces, modes = stretches(encoded)
        builder.add_document(encoded.token_ids, pieces, modes)
        kept.append(
            {
                "id": row.row_id,
                "source": row.source,
                "line": line,
                "tokens": len(encoded.token_ids),
                "trained": sum(end - start for start, end in encoded.trained_spans),
                "keys": [bytes.fromhex(text_key(m["content"])) for m in row.messages if m["role"] == "user"],
            }
        )
    builder.finalize(f"{prefix}.idx")
    _write_rows(fresh / files.ROWS, kept)
    write_rejects(fresh / files.REJECTS, rejects)
    counts = PartCounts(lines=lines.count, rows=len(kept), rejected=len(rejects))
    digests = {file.name: digest_of(file) for file in sorted(fresh.iterdir())}
    done = {"lines": counts.lines, "rows": counts.rows, "rejected": counts.rejected, "digests": digests}
    (fresh / DONE).write_text(json.dumps(done, indent=1), encoding="utf-8")
    fresh.rename(job.directory)
    return counts


class _Lines:
    """The rows of a part that parse; notes the others as rejected, and counts lines."""

    def __init__(self, job: PartJob, rejects: list[tuple[str, int, str]], name: str) -> None:
        self._job, self._rejects, self._name = job, rejects, name
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, SftRow]]:
        try:
            for value in read_part(self._job.part, self._name, self._job.line_bytes):
                self.count += 1
                if value is None:
                    continue
                row = [value] if isinstance(value, str) else parse_sft_row("", value)
                if isinstance(row, list):
                    self._rejects.append((self._name, self.count, "; ".join(row)))
                else:
                    yield self.count, row
        except OSError as error:
            raise unreadable(self._name, error) from error


def unreadable(name: str, error: OSError) -> DataError:
    """What is told of an input that the system cannot read."""
    why = error.strerror or error
    return DataError(
        f"data.sft: {name} cannot be read: {why}. Start again when it can; what is finished is kept, and no row of it "
        "was rejected for this"
    )


def _encoded(
    lines: Iterable[tuple[int, SftRow]], chat: ChatTokenizer, rejects: list[tuple[str, int, str]], name: str
) -> Iterator[tuple[int, SftRow, EncodedConversation]]:
    """Tokenize rows, many at a time but never more text than fits; those that cannot be are noted as rejected."""
    for some in _batches(lines):
        encoded = chat.encode_conversations([row.messages for _, row in some])
        for (line, row), tokens in zip(some, encoded, strict=True):
            final = row.messages[-1]["content"]
            if isinstance(tokens, ConversationError):
                rejects.append((name, line, str(tokens)))
            elif final.count(chat.think_start) > final.count(chat.think_end):
                rejects.append((name, line, f"the last answer opens {chat.think_start} and never closes it"))
            else:
                yield line, row, tokens


def _batches(lines: Iterable[tuple[int, SftRow]]) -> Iterator[list[tuple[int, SftRow]]]:
    some: list[tuple[int, SftRow]] = []
    characters = 0
    for line, row in lines:
        some.append((line, row))
        characters += sum(len(m["content"]) + len(m.get("reasoning_content", "")) for m in row.messages)
        if characters >= _CHARACTERS_AT_A_TIME:
            yield some
            some, characters = [], 0
    if some:
        yield some


def stretches(encoded: EncodedConversation) -> tuple[list[int], list[int]]:
    """Lengths and modes of the stretches that a conversation is stored as: prompt, answer, prompt, answer, ..."""
    lengths, modes, position = [], [], 0
    for start, end in encoded.trained_spans:
        for length, mode in ((start - position, 0), (end - start, files.TRAINED_MODE)):
            if length:
                lengths.append(length)
                modes.append(mode)
        position = end
    if position < len(encoded.token_ids):
        lengths.append(len(encoded.token_ids) - position)
        modes.append(0)
    return lengths, modes


def _write_rows(file: Path, kept: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("line", pa.int64()),
            ("tokens", pa.int32()),
            ("trained", pa.int32()),
            ("keys", pa.list_(pa.binary(16))),
        ]
    )
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), file)


@lru_cache(maxsize=1)
def _tokenizer(directory: str, think_start: str, think_end: str) -> ChatTokenizer:
    return load_chat_tokenizer(directory, think_start=think_start, think_end=think_end)
