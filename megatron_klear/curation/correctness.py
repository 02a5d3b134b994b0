"""Which responses are fine-tuned on: the paper keeps wrong ones on hard problems (section 5.1.1, Table 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.row import Response, Row
from megatron_klear.curation.stage import Stage, UnitLog


class CorrectnessStage(Stage):
    """Leaves out responses by their outcome and the difficulty of their prompt, and rows that none is left of.

    Args:
        settings: of the run.
    """

    name = "correctness"

    def __init__(self, settings: CurationSettings) -> None:
        self._settings = settings.correctness

    def depends_on(self) -> dict[str, Any]:
        """The rules."""
        return asdict(self._settings)

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows with the responses that stay."""
        for row in rows:
            kept = []
            for response in row.responses:
                reason = self._against(row, response)
                if reason is None:
                    log.audit.count("responses kept by outcome", response.outcome or "not graded")
                    kept.append(response)
                else:
                    log.audit.count("responses dropped", reason)
            if kept:
                row.responses = kept
                yield row
            else:
                log.drop(row, "no response left", responses=len(row.responses), difficulty=row.difficulty or "unknown")

    def _against(self, row: Row, response: Response) -> str | None:
        """Why a response is left out, or None."""
        rules = self._settings
        if not rules.keep_unfinished and (response.finish_reason == "length" or response.outcome == "malformed"):
            return "cut off" if response.finish_reason == "length" else "malformed"
        if response.outcome == "correct" or rules.keep_wrong == "all":
            return None
        if rules.keep_wrong == "hard" and row.difficulty == "hard":
            return None
        what = "not known to be correct" if response.outcome in ("", "ungraded") else "wrong"
        return f"{what}, {row.difficulty or 'unknown difficulty'}"
