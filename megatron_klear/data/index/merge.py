"""Finished parts into one index: every id once, lines counted from the start of each file, one fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.index import files
from megatron_klear.data.index.files import digest_of, index_prefix
from megatron_klear.data.index.tokenize import PartCounts, PartJob


def merge_parts(
    jobs: Sequence[PartJob], counts: Sequence[PartCounts], alive: Callable[[], None], *, is_alone: bool = True
) -> None:
    """Write the index from its parts, index.json last, and remove the parts.

    Of rows with the same id the first is kept; the others become rejects.

    Args:
        jobs, counts: all parts of one source in order, and what each holds.
        alive: called now and then.
        is_alone: whether nobody else can be making the same index.

    Raises:
        OSError: the index cannot be written.
    """
    source = jobs[0].source
    # The maker's own, by machine too: file systems without locks are such as machines share.
    fresh = source.directory / f"merged.{socket.gethostname()}.{os.getpid()}"
    for leftover in source.directory.glob("merged*"):  # of merges that were killed
        if is_alone or leftover == fresh:
            shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        _merge_into(fresh, jobs, counts, alive)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(source.directory / files.PARTS, ignore_errors=True)


def _merge_into(fresh: Path, jobs: Sequence[PartJob], counts: Sequence[PartCounts], alive: Callable[[], None]) -> None:
    """Write every file to `fresh`, then move them to their places."""
    source = jobs[0].source
    tables = [_table(job) for job in jobs]
    first_place = _first_places(tables)
    offsets = _line_offsets(jobs, counts)
    manifest = _write(fresh, jobs, tables, first_place, offsets, alive)
    _write_rejects(fresh, jobs, tables, first_place, offsets)
    manifest["rejected"] = sum(1 for _ in (fresh / files.REJECTS).open("rb"))
    manifest["lines"] = sum(c.lines for c in counts)
    names = sorted(file.name for file in fresh.iterdir())
    manifest["sizes"] = {name: (fresh / name).stat().st_size for name in names}
    # Small files are checked by content whenever the index is opened, the tokens by their number of bytes.
    manifest["digests"] = {name: digest_of(fresh / name) for name in names if not name.endswith(".bin")}
    for name in names:
        _sync(fresh / name)
        os.replace(fresh / name, source.directory / name)
    (fresh / files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(fresh / files.MANIFEST)
    os.replace(fresh / files.MANIFEST, source.directory / files.MANIFEST)


def _table(job: PartJob) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(job.directory / files.ROWS)


def _first_places(tables: Sequence[Any]) -> NDArray[np.int64]:
    """For each row of all parts, the number of the first row with its id, int64 [rows]; most rows name themselves.

    Ids are compared by 16-byte digests: 24 MB per million rows, whatever the ids' lengths.
    """
    digests = b"".join(
        hashlib.blake2b(row_id.encode(), digest_size=16).digest()
        for table in tables
        for row_id in table["id"].to_pylist()
    )
    keys = np.frombuffer(digests, dtype=np.dtype((np.void, 16)))
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[group.reshape(-1)], dtype=np.int64)


def _line_offsets(jobs: Sequence[PartJob], counts: Sequence[PartCounts]) -> list[int]:
    """Lines of the same file before each part."""
    offsets, file, line = [], -1, 0
    for job, count in zip(jobs, counts, strict=True):
        if job.part.file != file:
            file, line = job.part.file, 0
        offsets.append(line)
        line += count.lines
    return offsets


def _write(
    fresh: Path,
    jobs: Sequence[PartJob],
    tables: Sequence[Any],
    first_place: NDArray[np.int64],
    offsets: Sequence[int],
    alive: Callable[[], None],
) -> dict[str, Any]:
    """Write tokens, sources and rows; returns the manifest's part about them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = index_prefix(fresh, files.CONVERSATIONS)
    tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    sources: dict[str, int] = {}
    source_of: list[int] = []
    fingerprint = hashlib.blake2b(digest_size=16)
    before, kept_tables = 0, []
    for job, table, offset in zip(jobs, tables, offsets, strict=True):
        alive()
        own = np.arange(before, before + len(table))
        kept = first_place[before : before + len(table)] == own
        before += len(table)
        if len(table):
            part = IndexedDataset(index_prefix(job.directory, files.CONVERSATIONS), multimodal=True)
            ids, names = table["id"].to_pylist(), table["source"].to_pylist()
            for row in np.flatnonzero(kept).tolist():
                first, last = (int(i) for i in part.document_indices[row : row + 2])
                pieces, modes = part[first:last]
                joined, lengths = np.concatenate(pieces), [len(piece) for piece in pieces]
                tokens.add_document(joined, lengths, modes.tolist())
                fingerprint.update(f"{ids[row]}\0{_trained_spans(lengths, modes)}\0".encode())
                fingerprint.update(joined.tobytes())
                source_of.append(sources.setdefault(names[row], len(sources)))
        kept_table = table.filter(pa.array(kept))
        line = pa.array(kept_table["line"].to_numpy() + offset)
        file = pa.array(np.full(len(kept_table), job.part.file, dtype=np.int32))
        kept_table = kept_table.drop_columns(["source", "line"])
        kept_tables.append(kept_table.append_column("file", file).append_column("line", line))
    tokens.finalize(f"{prefix}.idx")
    prefix = index_prefix(fresh, files.SOURCES)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.array(source_of, dtype=np.int32), [1] * len(source_of))
    builder.finalize(f"{prefix}.idx")
    pq.write_table(pa.concat_tables(kept_tables), fresh / files.ROWS)
    return {
        "format": files.FORMAT,
        "files": list(jobs[0].source.files),
        "conversations": len(source_of),
        "sources": list(sources),
        "fingerprint": fingerprint.hexdigest(),
    }


def _trained_spans(lengths: Sequence[int], modes: NDArray[np.int8]) -> tuple[tuple[int, int], ...]:
    ends = np.cumsum(lengths).tolist()
    return tuple(
        (end - length, end)
        for length, end, mode in zip(lengths, ends, modes, strict=True)
        if mode == files.TRAINED_MODE
    )


def _write_rejects(
    fresh: Path,
    jobs: Sequence[PartJob],
    tables: Sequence[Any],
    first_place: NDArray[np.int64],
    offsets: Sequence[int],
) -> None:
    files.write_rejects(fresh / files.REJECTS, _rejects(jobs, tables, first_place, offsets))


def _rejects(
    jobs: Sequence[PartJob], tables: Sequence[Any], first_place: NDArray[np.int64], offsets: Sequence[int]
) -> Iterator[tuple[str, int, str]]:
    starts = np.cumsum([0, *(len(table) for table in tables)])
    for number, (job, table, offset) in enumerate(zip(jobs, tables, offsets, strict=True)):
        name = job.source.files[job.part.file]
        found = []
        for text in (job.directory / files.REJECTS).open(encoding="utf-8"):
            reject = json.loads(text)
            found.append((name, reject["line"] + offset, reject["reason"]))
        places = first_place[starts[number] : starts[number + 1]]
        for row in np.flatnonzero(places != np.arange(starts[number], starts[number + 1])).tolist():
            other = int(np.searchsorted(starts, places[row], side="right")) - 1
            other_row = int(places[row] - starts[other])
            where = (
                f"{job.source.files[jobs[other].part.file]}:{tables[other]['line'][other_row].as_py() + offsets[other]}"
            )
            reason = f"has the id {table['id'][row].as_py()!r} of {where}; ids must be unique"
            found.append((name, table["line"][row].as_py() + offset, reason))
        yield from sorted(found, key=lambda reject: reject[1])


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
