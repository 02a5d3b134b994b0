"""What an index consists of, and the key that says which input it was made from.

    INDEX_DIR/KEY/
      conversations.bin .idx   Megatron-Core's indexed format with a mode per sequence: a document is a conversation,
                               its sequences are stretches of it, mode 1 where tokens are trained and 0 elsewhere
      sources.bin .idx         one document of one int32 per conversation: the number of its source in index.json
      rows.parquet             per conversation: id, file, line, tokens, trained tokens, digests of the user's messages
      rejects.jsonl            {"file", "line", "reason"} of every row that is not in it
      index.json               counts, source names, sizes and the fingerprint; written last, so with it all is there
      parts/                   while it is made: finished parts, each with its own digests

`IndexedDataset(".../conversations", multimodal=True)` reads it; without `multimodal` it is a plain token data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.config import INDEX_FOLDER
from megatron_klear.errors import DataError

FORMAT = 3
"""Raised whenever the same rows would be written otherwise."""

_END_BYTES = 1 << 16
"""Of either end of an input file that its key takes in."""

CONVERSATIONS, SOURCES, ROWS, REJECTS, MANIFEST = (
    "conversations",
    "sources",
    "rows.parquet",
    "rejects.jsonl",
    "index.json",
)
PARTS = "parts"
TRAINED_MODE = 1

_DIGESTED_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexSource:
    """What an index is made from.

    Attributes:
        files: input files in order.
        tokenizer_dir: Hugging Face tokenizer directory.
        think_start, think_end: think markers.
        directory: where the index of exactly this input lies or will lie.
    """

    files: tuple[str, ...]
    tokenizer_dir: str
    think_start: str
    think_end: str
    directory: Path


def describe_source(
    files: Sequence[str], tokenizer_dir: str, think_start: str, think_end: str, *, index_dir: str | None = None
) -> IndexSource:
    """Say where the index of these files belongs.

    The key takes in each file's name, size, time of change and both ends (files of many directories may have the same
    names, and archives and buckets the same times), the content of the tokenizer's files (its chat template is one of
    them), the think markers and the format's version.

    Raises:
        DataError: an input file cannot be seen.
    """
    digest = hashlib.blake2b(f"{FORMAT}\0{think_start}\0{think_end}\0".encode(), digest_size=12)
    for name in files:
        try:
            status = Path(name).stat()
            with Path(name).open("rb") as stream:
                head = stream.read(_END_BYTES)
                stream.seek(max(0, status.st_size - _END_BYTES))
                tail = stream.read(_END_BYTES)
        except OSError as error:
            raise DataError(f"data.sft: {name} cannot be read: {error.strerror}") from error
        digest.update(f"{Path(name).name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(hashlib.blake2b(head + tail, digest_size=16).digest())
    for file in sorted(Path(tokenizer_dir).iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(f"{file.name}\0".encode())
            digest.update(file.read_bytes())
    root = Path(index_dir) if index_dir is not None else Path(files[0]).parent / INDEX_FOLDER
    return IndexSource(
        files=tuple(files),
        tokenizer_dir=tokenizer_dir,
        think_start=think_start,
        think_end=think_end,
        directory=root / digest.hexdigest(),
    )


def digest_of(file: Path) -> str:
    """Digest of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(_DIGESTED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def write_rejects(file: Path, rejects: Iterable[tuple[str, int, str]]) -> None:
    """Write (file, line, reason) of rows that cannot be used, one JSON object a line."""
    with file.open("w", encoding="utf-8") as stream:
        for name, line, reason in rejects:
            stream.write(json.dumps({"file": name, "line": line, "reason": reason}) + "\n")


def index_prefix(directory: Path, name: str) -> str:
    """Path without ending, as Megatron-Core wants it."""
    return str(directory / name)
