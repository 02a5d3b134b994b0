"""Reads an index: lengths at once, tokens and rows one by one from the disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.index import files
from megatron_klear.data.index.files import digest_of, index_prefix
from megatron_klear.errors import DataError
from megatron_klear.records import IntArray

_ROWS_AT_A_TIME = 10_000


class SftIndex:
    """A finished index. It can be sent to another process, where it is opened again.

    Args:
        directory: where it lies.

    Attributes:
        directory: where it lies.
        fingerprint: of all ids, tokens and masks, in order.
        lengths: int64 [N], tokens of each conversation.
        trained: int64 [N], how many of them are trained.

    Raises:
        DataError: it is not there, or not whole.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            manifest = json.loads((directory / files.MANIFEST).read_text(encoding="utf-8"))
            damaged = [n for n, size in manifest["sizes"].items() if (directory / n).stat().st_size != size]
            damaged = damaged or [n for n, d in manifest["digests"].items() if digest_of(directory / n) != d]
        except FileNotFoundError as error:
            raise DataError(
                f"data.index_dir: {error.filename} is not there. The first rank makes the index for all: "
                "let data.sft, or data.index_dir, lie where all nodes see it, or run python -m megatron_klear.data on "
                "each of them"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"data.index_dir: {directory} cannot be read ({error}); remove it to make it anew"
            ) from error
        if damaged:
            names = ", ".join(damaged)
            raise DataError(
                f"data.index_dir: {names} in {directory} changed since it was made; remove it to make it anew"
            )
        self._manifest = manifest
        self._columns: dict[str, Any] = {}
        self.fingerprint: str = manifest["fingerprint"]
        self.lengths: IntArray = np.empty(0, dtype=np.int64)
        self.trained: IntArray = np.empty(0, dtype=np.int64)
        if len(self):
            starts, lengths = self._documents[:-1], self._tokens.index.sequence_lengths.astype(np.int64)
            self.lengths = np.add.reduceat(lengths, starts)
            modes = self._tokens.index.sequence_modes
            self.trained = np.add.reduceat(np.where(modes == files.TRAINED_MODE, lengths, 0), starts)

    def __len__(self) -> int:
        return int(self._manifest["conversations"])

    def __reduce__(self) -> tuple[type[SftIndex], tuple[Path]]:
        return SftIndex, (self.directory,)

    @property
    def rejected(self) -> int:
        """Rows that are not in it; rejects.jsonl says which and why."""
        return int(self._manifest["rejected"])

    @property
    def rejects_file(self) -> Path:
        """List of the rejected rows."""
        return self.directory / files.REJECTS

    @property
    def file_names(self) -> list[str]:
        """The input files."""
        return list(self._manifest["files"])

    def rejects(self, limit: int) -> Iterator[tuple[str, int, str]]:
        """(file, line, reason) of the first rejected rows."""
        with self.rejects_file.open(encoding="utf-8") as stream:
            for text in itertools.islice(stream, limit):
                reject = json.loads(text)
                yield reject["file"], reject["line"], reject["reason"]

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of a conversation, int32 [L]; a view of the file, not to be written to."""
        ids: NDArray[np.int32]
        ids, _ = self._tokens.get(int(self._documents[row]), length=int(self.lengths[row]))
        return ids

    def trained_mask(self, row: int) -> NDArray[np.bool_]:
        """Bool [L], True at tokens to train on; entry 0 is False."""
        first, last = self._documents[row], self._documents[row + 1]
        trained = self._tokens.index.sequence_modes[first:last] == files.TRAINED_MODE
        mask: NDArray[np.bool_] = np.repeat(trained, self._tokens.index.sequence_lengths[first:last])
        return mask

    def row_id(self, row: int) -> str:
        """The id that the row has in its file."""
        return str(self._column("id")[row].as_py())

    def source(self, row: int) -> str:
        """Where the row says it comes from."""
        return str(self._manifest["sources"][int(self._sources[row])])

    def by_source(self, rows: IntArray) -> list[tuple[str, int, int]]:
        """(source, tokens, conversations) of these rows, the source with most tokens first."""
        names = self._manifest["sources"]
        numbers = self._sources[rows]
        # Weights are summed as float64, exact below 2**53 tokens.
        tokens = np.bincount(numbers, weights=self.lengths[rows], minlength=len(names)).astype(np.int64)
        counts = np.bincount(numbers, minlength=len(names))
        order = np.argsort(-tokens, kind="stable")
        return [(str(names[i]), int(tokens[i]), int(counts[i])) for i in order.tolist() if counts[i]]

    def where(self, row: int) -> str:
        """File and line of a row."""
        file = self._manifest["files"][self._column("file")[row].as_py()]
        return f"{file}:{self._column('line')[row].as_py()}"

    def keys(self) -> Iterator[tuple[str, str]]:
        """(id, text key) of each user message, for `require_disjoint`."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.directory / files.ROWS) as table:
            for batch in table.iter_batches(_ROWS_AT_A_TIME, columns=["id", "keys"]):
                for row_id, keys in zip(batch["id"].to_pylist(), batch["keys"].to_pylist(), strict=True):
                    for key in keys:
                        yield row_id, key.hex()

    @cached_property
    def _tokens(self) -> Any:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(index_prefix(self.directory, files.CONVERSATIONS), multimodal=True)

    @cached_property
    def _documents(self) -> IntArray:
        documents: IntArray = self._tokens.document_indices
        return documents

    @cached_property
    def _sources(self) -> NDArray[np.int32]:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        numbers = IndexedDataset(index_prefix(self.directory, files.SOURCES))
        every: NDArray[np.int32] = np.concatenate(numbers[:]) if len(numbers) else np.empty(0, dtype=np.int32)
        return every

    def _column(self, name: str) -> Any:
        """A column of the rows, read when it is first asked for: most runs need the ids only."""
        if name not in self._columns:
            import pyarrow.parquet as pq

            self._columns[name] = pq.read_table(self.directory / files.ROWS, columns=[name])[name]
        return self._columns[name]
