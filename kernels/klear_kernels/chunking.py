"""How many rows of logits are held at a time."""

from __future__ import annotations

import torch

CHUNK_BYTES = {"cpu": 256 << 20}
"""Bytes of logits per chunk by device type; others take DEFAULT_CHUNK_BYTES."""

DEFAULT_CHUNK_BYTES = 1 << 30
"""Enough rows for full-speed products at any vocabulary on a GPU, far below one copy of all logits."""

MAX_CHUNK_ELEMENTS = 2**31 - 1
"""A chunk is indexed with 32 bits inside many kernels, so rows x V_local stays below this."""

_ROW_MULTIPLE = 16


def chunk_slices(
    num_rows: int,
    *,
    vocab_rows: int,
    word_bytes: float,
    device: torch.device,
    chunk_tokens: int | None,
    budget_bytes: int | None = None,
) -> list[slice]:
    """Split `num_rows` rows into near-equal slices that fit the budget.

    Depends only on numbers that all tensor-parallel ranks share, so that they chunk alike.

    Args:
        num_rows: rows to compute.
        vocab_rows: V_local, padding included (the valid rows differ between ranks).
        word_bytes: bytes held per row and word, as those of a logit.
        device: picks the budget where `budget_bytes` is None.
        chunk_tokens: most rows per chunk, or None for the budget's choice.
        budget_bytes: most bytes of a chunk, for backends that hold something else than float32 logits.
    """
    if num_rows == 0:
        return []
    most = chunk_tokens
    if most is None:
        budget = CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES) if budget_bytes is None else budget_bytes
        most = max(int(budget / (vocab_rows * word_bytes)), _ROW_MULTIPLE)
    most = max(min(most, MAX_CHUNK_ELEMENTS // vocab_rows, num_rows), 1)
    num_chunks = -(-num_rows // most)
    # Near-equal chunks: a last chunk of a few rows would cast or read the whole weight for nothing.
    even = -(-num_rows // num_chunks)
    rows = min(-(-even // _ROW_MULTIPLE) * _ROW_MULTIPLE, most)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]
