"""Sources by quality: only the best of a ranking stay (section 5.1.3, Tables 4 and 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.row import Row
from megatron_klear.curation.stage import Stage, UnitLog


class SourcesStage(Stage):
    """Keeps rows of the first `sources.*_top` sources of their domain's ranking; a domain without one keeps all.

    Args:
        settings: of the run.
    """

    name = "sources"

    def __init__(self, settings: CurationSettings) -> None:
        self._settings = settings.sources
        self._rank = {
            "math": {name: place for place, name in enumerate(settings.sources.math_ranking)},
            "code": {name: place for place, name in enumerate(settings.sources.code_ranking)},
        }
        self._top = {"math": settings.sources.math_top, "code": settings.sources.code_top}

    def depends_on(self) -> dict[str, Any]:
        """The rankings."""
        return asdict(self._settings)

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows of the best sources."""
        for row in rows:
            ranking, name = self._rank[row.domain], row.source or "(none)"
            place = ranking.get(row.source)
            if not ranking or (place is not None and place < self._top[row.domain]):
                log.audit.count("kept by source", name)
                yield row
                continue
            log.audit.count("dropped by source", name)
            if place is None:
                log.drop(row, "source not ranked", source=name)
            else:
                log.drop(row, "source ranked too low", source=name, place=place + 1)
