"""A budget of prompts by K-Center greedy selection, so that the chosen cover the whole (Tables 2, 4 and 5)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.batches import batches
from megatron_klear.curation.files import read_json, read_row_file, write_json
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Advance, Stage, UnitLog
from megatron_klear.data.index.files import digest_of
from megatron_klear.records import Domain

SELECTION_FILE = "selection.json"
_BATCH_ROWS = 1024
_MIX = 0x9E3779B9


class SelectStage(Stage):
    """Keeps the prompts that K-Center greedy selection chooses, domain by domain.

    All embeddings of a domain are looked at for each choice: they lie in a file that is mapped into memory, 8 bytes
    times N times D, and are squared all at once at the start. The other stages' bound on memory does not hold here. The
    file is kept until all is chosen, so that a start which ends in between costs no second run of the encoder.

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
        for domain in get_args(Domain):
            _Vectors.at(directory, domain).delete()
        self._chosen = {domain: set(ids) for domain, ids in found["chosen"].items()}
        self._unusable = found["unusable"]

    def state_is_whole(self, directory: Path) -> bool:
        """Whether it is known what was chosen, or nothing was judged by it yet."""
        return read_json(directory / SELECTION_FILE) is not None or not any((directory / "units").glob("*.json"))

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
        embedder = cache(lambda: make_embedder(self._settings, device))
        budgets: dict[Domain, int | None] = {"math": self._settings.math, "code": self._settings.code}
        chosen: dict[str, list[str]] = {}
        radius: dict[str, list[float]] = {}
        unusable: dict[str, str] = {}
        for domain, budget in budgets.items():
            if budget is None:
                continue
            vectors = _Vectors.at(directory, domain)
            if not vectors.are_there():
                vectors.write(embedder, inputs)
            unusable.update(vectors.unusable)
            chosen[domain], radius[domain] = self._chosen_of(vectors, budget, advance)
        return {"chosen": chosen, "radius": radius, "unusable": unusable}

    def _chosen_of(self, vectors: _Vectors, budget: int, advance: Advance) -> tuple[list[str], list[float]]:
        ids = vectors.ids
        if budget >= len(ids):
            return list(ids), []
        from megatron_klear.curation.k_center import k_center_greedy

        points = np.memmap(vectors.file, np.float64, "r", shape=(len(ids), vectors.width))
        first = int(np.random.SeedSequence([self._seed, _MIX]).generate_state(1, np.uint64)[0] % len(ids))
        picked, radii = k_center_greedy(points, budget, first=first, advance=advance)
        # The curve of the radius is for a picture: a hundred points of it will do.
        some = np.unique(np.linspace(0, len(radii) - 1, 100).astype(int))
        return [ids[i] for i in picked], [round(float(radii[i]), 5) for i in some]


@dataclass(slots=True)
class _Vectors:
    """The unit vectors of a domain's rows, one after another in a file, float64 [N, D].

    Attributes:
        domain: of the rows.
        file: of the vectors.
        ids: of the rows that have one.
        width: D.
        unusable: why other rows have none, by id.
    """

    domain: Domain
    file: Path
    ids: list[str] = field(default_factory=list)
    width: int = 0
    unusable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, directory: Path, domain: Domain) -> Self:
        """Of a stage's directory, whether they are there or not."""
        return cls(domain, directory / f".vectors-{domain}.f64")

    @property
    def _note(self) -> Path:
        return self.file.with_suffix(".json")

    def are_there(self) -> bool:
        """Take over what an earlier start wrote, if it is whole."""
        note = read_json(self._note)
        try:
            if note["digest"] != digest_of(self.file):
                return False
            self.ids, self.width, self.unusable = note["ids"], note["width"], note["unusable"]
        except (OSError, KeyError, TypeError):
            return False
        return True

    def write(self, embedder: Callable[[], Any], inputs: Sequence[Path]) -> None:
        """Embed the rows; the note beside the vectors is there when all of them are."""
        from megatron_klear.curation.embed import unit_vector

        self.delete()
        width: int | None = None
        with self.file.open("wb") as out:
            rows = (row for path in inputs for row in read_row_file(path) if row.domain == self.domain)
            for batch in batches(rows, _BATCH_ROWS):
                for row, vector in zip(batch, embedder().embed(batch), strict=True):
                    unit = unit_vector(vector, width)
                    if isinstance(unit, str):
                        self.unusable[row.row_id] = unit
                        continue
                    width = len(unit)
                    self.ids.append(row.row_id)
                    out.write(unit.tobytes())
            out.flush()
            os.fsync(out.fileno())
        self.width = width or 0
        told = {"digest": digest_of(self.file), "ids": self.ids, "width": self.width, "unusable": self.unusable}
        write_json(self._note, told)

    def delete(self) -> None:
        """Remove them, the note first."""
        self._note.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)
