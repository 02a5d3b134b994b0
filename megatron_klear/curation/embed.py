"""Embeddings of prompts: from the rows, from a file, or from an encoder that is run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_klear.config.curation import SelectionSettings
from megatron_klear.curation.row import Row
from megatron_klear.errors import DataError

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """Gives each row its vector, or says why it has none."""

    def embed(self, rows: Sequence[Row]) -> list[Vectors | str]:
        """A vector float32 [D] per row, of any length, or what is wrong."""
        ...


class ColumnEmbeddings:
    """The rows' own column."""

    def embed(self, rows: Sequence[Row]) -> list[Vectors | str]:
        """See `Embedder`."""
        missing = "has no embedding, which selection.embeddings=column takes"
        return [missing if r.embedding is None else np.asarray(r.embedding, np.float32) for r in rows]


class FileEmbeddings:
    """An .npy file of N vectors, and a file with their N ids, one a line; vectors are read as they are needed.

    Raises:
        DataError: the files do not fit together.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            # Not splitlines: an id may hold what else ends a line in Unicode.
            ids = path.with_suffix(".ids").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"selection.path = {path}: cannot be read: {error}") from error
        shape = self._vectors.shape
        if self._vectors.ndim != 2 or shape[0] != len(ids) or self._vectors.dtype.kind != "f":
            raise DataError(
                f"selection.path = {path}: holds {self._vectors.dtype} {shape} for {len(ids)} ids; it must hold one "
                "vector of floats per id"
            )
        self._place = {name: place for place, name in enumerate(ids)}
        if len(self._place) < len(ids):
            repeated = next(name for place, name in enumerate(ids) if self._place[name] != place)
            raise DataError(f"selection.path = {path}: its file of ids names {repeated!r} more than once")

    def embed(self, rows: Sequence[Row]) -> list[Vectors | str]:
        """See `Embedder`."""
        found: list[Vectors | str] = []
        for row in rows:
            place = self._place.get(row.row_id)
            vector = None if place is None else np.asarray(self._vectors[place], np.float32)
            found.append("has no vector in the file of selection.path" if vector is None else vector)
        return found


class EncoderEmbeddings:
    """A Hugging Face encoder: the mean of its last hidden states over the tokens of the prompt.

    Raises:
        DataError: the directory holds no usable encoder.
    """

    def __init__(self, settings: SelectionSettings, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._settings, self._device = settings, device
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.path, local_files_only=True)
            self._model = AutoModel.from_pretrained(settings.path, local_files_only=True).to(device).eval()
        except Exception as error:  # whatever a damaged file makes the library raise
            raise DataError(f"selection.path = {settings.path}: the encoder cannot be loaded: {error}") from error

    def embed(self, rows: Sequence[Row]) -> list[Vectors | str]:
        """See `Embedder`."""
        import torch

        vectors: list[Vectors | str] = []
        size = self._settings.batch_prompts
        for start in range(0, len(rows), size):
            texts = [row.prompt_text for row in rows[start : start + size]]
            tokens = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._settings.max_tokens, return_tensors="pt"
            ).to(self._device)
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            means = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
            vectors += list(means.cpu().numpy())
        return vectors


def make_embedder(settings: SelectionSettings, device: str) -> Embedder:
    """What `selection.embeddings` asks for.

    Raises:
        DataError: file or encoder cannot be used.
    """
    if settings.embeddings == "column":
        return ColumnEmbeddings()
    if settings.embeddings == "file":
        return FileEmbeddings(Path(settings.path or ""))
    return EncoderEmbeddings(settings, device)


def unit_vector(vector: Vectors | str, width: int | None) -> NDArray[np.float64] | str:
    """The vector at length 1, float64 [D], or why it cannot be used.

    Args:
        vector: float32 [D], or what is already wrong.
        width: D of the vectors before; None for the first.
    """
    if isinstance(vector, str):
        return vector
    if width is not None and len(vector) != width:
        return f"its embedding has {len(vector)} numbers, those before have {width}"
    if len(vector) < 2:
        return "its embedding has fewer than two numbers"
    exact = vector.astype(np.float64)
    length = float(np.linalg.norm(exact))
    if not 0.0 < length < float("inf"):
        return "its embedding has no direction (all zeros, or not finite)"
    return np.asarray(exact / length)
