"""Responses of a ledger as JSON lines or Parquet, one row per response."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_klear.errors import DataError
from megatron_klear.rollout.ledger.entries import StoredGroup
from megatron_klear.rollout.ledger.filter import GroupFilter
from megatron_klear.rollout.ledger.reading import LedgerReader, ResponseRow
from megatron_klear.rollout.ledger.terms import recorded_opening
from megatron_klear.rollout.ledger.text import Decode

_ROWS_AT_A_TIME = 512


def export(reader: LedgerReader, chosen: GroupFilter, out: Path, decode: Decode | None, *, tokens: bool) -> int:
    """Write the chosen responses; the file appears whole or not at all.

    Args:
        reader: of the ledger; in its `snapshot`, where a run may be writing.
        chosen: which responses.
        out: a name ending in `.jsonl` or `.parquet`.
        decode: makes text of tokens; None leaves texts out. What the chat template opened for the responses, as
            "<think>", is put before them: they are the texts that were graded, and their end tokens.
        tokens: also write token ids and logprobs.

    Returns:
        Rows written.

    Raises:
        DataError: the name ends otherwise, Parquet is wanted and pyarrow is not installed, or it cannot be written.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"OUT: {out} must end in .jsonl or .parquet")
    writer = _write_jsonl if out.suffix == ".jsonl" else _write_parquet
    fresh = out.with_name(out.name + ".new")
    try:
        count = writer(_rows(reader, chosen, decode, tokens), fresh)
        os.replace(fresh, out)
    except OSError as error:
        raise DataError(f"OUT: {out} cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return count


def _rows(reader: LedgerReader, chosen: GroupFilter, decode: Decode | None, tokens: bool) -> Iterator[dict[str, Any]]:
    group: StoredGroup | None = None
    opening = recorded_opening(reader)
    for row in reader.response_rows(chosen):
        if group is None or group.group_id != row.group_id:
            group = reader.load(row.group_id)
        assert group is not None
        yield _row(row, group, opening(row.step), decode, tokens)


def _row(row: ResponseRow, group: StoredGroup, opening: str, decode: Decode | None, tokens: bool) -> dict[str, Any]:
    rollout = group.rollouts.get(row.response_index)  # absent when its tokens were removed to save space
    values: dict[str, Any] = {
        "group_id": row.group_id,
        "prompt_id": row.prompt_id,
        "domain": group.prompt.domain,
        "epoch": row.epoch,
        "response_index": row.response_index,
        "state": row.state,
        "step": row.step,
        "draws": group.draws,
        "finish_reason": row.finish_reason,
        "num_tokens": row.num_tokens,
        "policy_versions": [list(run) for run in row.versions],
        "requests": row.attempts,
        "outcome": row.outcome,
        "reward": row.reward,
        "reason": row.reason,
        "reference": group.prompt.reference,
        "prompt": group.prompt.text,
    }
    if decode is not None:
        values["response"] = None if rollout is None else opening + decode(rollout.response_ids)
    if tokens:
        values["prompt_token_ids"] = group.prompt.token_ids.tolist()
        values["token_ids"] = None if rollout is None else rollout.response_ids.tolist()
        values["logprobs"] = None if rollout is None else rollout.rollout_logprobs.tolist()
    return values


def _write_jsonl(rows: Iterator[dict[str, Any]], file: Path) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], file: Path) -> int:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError("OUT: Parquet needs the package pyarrow, which is not installed; write .jsonl") from error
    kinds = {
        **dict.fromkeys(("group_id", "epoch", "response_index", "step", "draws"), arrow.int64()),
        **dict.fromkeys(("num_tokens", "requests"), arrow.int64()),
        **dict.fromkeys(("prompt_token_ids", "token_ids"), arrow.list_(arrow.int64())),
        "policy_versions": arrow.list_(arrow.list_(arrow.int64())),
        "logprobs": arrow.list_(arrow.float32()),
        "reward": arrow.float64(),
    }
    count, chunk = 0, list[dict[str, Any]]()
    writer: Any = None

    def flush() -> None:
        nonlocal writer, count
        # By name and not by what the first rows hold: a column may begin with nothing but nulls.
        schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in (chunk[0] if chunk else ())])
        writer = writer or parquet.ParquetWriter(file, schema)
        writer.write_table(arrow.Table.from_pylist(chunk, schema=schema))
        count += len(chunk)
        chunk.clear()

    for row in rows:
        chunk.append(row)
        if len(chunk) == _ROWS_AT_A_TIME:
            flush()
    if chunk or writer is None:
        flush()
    writer.close()
    return count
