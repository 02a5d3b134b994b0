"""Arrays and version runs as SQLite stores them: little-endian bytes, and JSON."""

from __future__ import annotations

import json

import numpy as np

from megatron_klear.records import FloatArray, IntArray


def pack_tokens(token_ids: IntArray) -> bytes:
    """Token ids as int32, half the size; no vocabulary comes near 2**31."""
    return np.asarray(token_ids).astype("<i4").tobytes()


def unpack_tokens(blob: bytes) -> IntArray:
    """int64 [L]."""
    return np.frombuffer(blob, dtype="<i4").astype(np.int64)


def pack_logprobs(logprobs: FloatArray) -> bytes:
    """Logprobs as float32, to the bit: what is trained after a resume is what was sampled."""
    return np.asarray(logprobs, dtype="<f4").tobytes()


def unpack_logprobs(blob: bytes) -> FloatArray:
    """float32 [L]."""
    return np.frombuffer(blob, dtype="<f4").astype(np.float32)


def pack_versions(runs: tuple[tuple[int, int], ...]) -> str:
    """(version, tokens) runs as a JSON text, readable in any SQLite shell."""
    return json.dumps([list(run) for run in runs], separators=(",", ":"))


def unpack_versions(text: str) -> tuple[tuple[int, int], ...]:
    """(version, tokens) runs."""
    return tuple((int(version), int(count)) for version, count in json.loads(text))
