"""A budget of prompts by K-Center greedy selection, so that the chosen cover the whole (Tables 2, 4 and 5)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.batches import batches
from megatron_klear.curation.files import read_json, read_row_file, write_json
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog
from megatron_klear.records import Domain

SELECTION_FILE = "selection.json"
_BATCH_ROWS = 1024
_MIX = 0x9E3779B9


class SelectStage(Stage):
    """Keeps the prompts that K-Center greedy selection chooses, domain by domain.

    All embeddings of a domain are looked at for each choice: they lie in a file that is mapped into memory, 8 bytes
    times N times D, and are squared all at once at the start. The other stages' bound on memory does not hold here.

    Args:
        settings: of the run.
    """

    name = "select"
    stateless = False
    counts = "choices"

    def __init__(self, settings: CurationSettings) -> None:
        self._settings, self._seed = settings.selection, settings.run.seed
        self._chosen: dict[str, set[str]] = {}
        self._unusable: dict[str, str] = {}

    def depends_on(self) -> dict[str, Any]:
        """The budget, where embeddings come from, and the seed."""
        settings = asdict(self._settings)
        for name in ("device", "batch_prompts"):
            del settings[name]
        path = self._settings.path
        files = (
            []
            if path is None
            else [Path(path), Path(path).with_suffix(".ids")]
            if Path(path).is_file()
            else sorted(Path(path).iterdir())
        )
        status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        return {**settings, "seed": self._seed, "files": status}

    def start(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> None:
        """Choose, unless it has been done; what was chosen is kept beside the units.

        Raises:
            DataError: file or encoder cannot be used.
        """
        found = read_json(directory / SELECTION_FILE)
        if found is None:
            found = self._choose(inputs, directory, advance)
            write_json(directory / SELECTION_FILE, found)
        self._chosen = {domain: set(ids) for domain, ids in found["chosen"].items()}
        self._unusable = found["unusable"]

    def state_is_whole(self, directory: Path) -> bool:
        """Whether it is known what was chosen."""
        return read_json(directory / SELECTION_FILE) is not None

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield the chosen rows, without the embeddings that are not needed any more."""
        for row in rows:
            chosen = self._chosen.get(row.domain)
            if row.row_id in self._unusable:
                log.reject(row, self._unusable[row.row_id], "embedding that cannot be used")
            elif chosen is None or row.row_id in chosen:
                log.audit.count("kept by source", row.source or "(none)")
                row.embedding = None
                yield row
            else:
                log.audit.count("dropped by source", row.source or "(none)")
                log.drop(row, "not selected")

    def _choose(self, inputs: Sequence[Path], directory: Path, advance: Advance) -> dict[str, Any]:
        import torch

        from megatron_klear.curation.embed import make_embedder

        device = self._settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        embedder = make_embedder(self._settings, device)
        budgets: dict[Domain, int | None] = {"math": self._settings.math, "code": self._settings.code}
        chosen: dict[str, list[str]] = {}
        radius: dict[str, list[float]] = {}
        unusable: dict[str, str] = {}
        for domain, budget in budgets.items():
            if budget is None:
                continue
            vectors = directory / f".vectors-{domain}.f64"
            try:
                ids, width = _write_vectors(embedder, inputs, domain, vectors, unusable)
                chosen[domain], radius[domain] = self._chosen_of(ids, width, vectors, budget, advance)
            finally:
                vectors.unlink(missing_ok=True)
        return {"chosen": chosen, "radius": radius, "unusable": unusable}

    def _chosen_of(
        self, ids: Sequence[str], width: int, vectors: Path, budget: int, advance: Advance
    ) -> tuple[list[str], list[float]]:
        if budget >= len(ids):
            return list(ids), []
        from megatron_klear.curation.k_center import k_center_greedy

        points = np.memmap(vectors, np.float64, "r", shape=(len(ids), width))
        first = int(np.random.SeedSequence([self._seed, _MIX]).generate_state(1, np.uint64)[0] % len(ids))
        picked, radii = k_center_greedy(points, budget, first=first, advance=advance)
        # The curve of the radius is for a picture: a hundred points of it will do.
        some = np.unique(np.linspace(0, len(radii) - 1, 100).astype(int))
        return [ids[i] for i in picked], [round(float(radii[i]), 5) for i in some]


def _write_vectors(
    embedder: Any, inputs: Sequence[Path], domain: Domain, file: Path, unusable: dict[str, str]
) -> tuple[list[str], int]:
    """Write the unit vectors of a domain's rows one after another; returns their ids and the width."""
    from megatron_klear.curation.embed import unit_vector

    ids: list[str] = []
    width: int | None = None
    with file.open("wb") as out:
        rows = (row for path in inputs for row in read_row_file(path) if row.domain == domain)
        for batch in batches(rows, _BATCH_ROWS):
            for row, vector in zip(batch, embedder.embed(batch), strict=True):
                unit = unit_vector(vector, width)
                if isinstance(unit, str):
                    unusable[row.row_id] = unit
                    continue
                width = len(unit)
                ids.append(row.row_id)
                out.write(unit.tobytes())
        out.flush()
        os.fsync(out.fileno())
    return ids, width or 0
