"""The last stage: rows as the trainer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.files import RowWriter
from megatron_klear.curation.row import Row, final_schema, to_final
from megatron_klear.curation.stage import Stage, UnitLog


class ExportStage(Stage):
    """One row per response to fine-tune on (`data.sft`), or one row per problem to reinforce on (`data.prompts`).

    Args:
        settings: of the run.
    """

    name = "export"
    schema = staticmethod(final_schema)

    def __init__(self, settings: CurationSettings) -> None:
        self._task, self._as_json = settings.run.task, settings.run.result_format == "jsonl"

    def depends_on(self) -> dict[str, Any]:
        """What rows are for."""
        return {"task": self._task}

    def apply(self, rows: Iterator[Row], log: UnitLog) -> Iterator[Row]:
        """Yield rows with one response each, or rows without."""
        for row in rows:
            if self._task == "rl":
                if row.reference is None:
                    log.reject(row, "has no reference, and a problem to reinforce on needs one", "no reference")
                    continue
                log.audit.count("rows by source", row.source or "(none)")
                yield replace(row, responses=[])
                continue
            if not row.responses:
                log.drop(row, "no response")
            for number, response in enumerate(row.responses):
                log.audit.count("rows by source", row.source or "(none)")
                name = row.row_id if len(row.responses) == 1 else f"{row.row_id}#{number}"
                yield replace(row, row_id=name, responses=[response])

    def write(self, row: Row, writer: RowWriter) -> None:
        """Hand a row to the writer, as JSON without what it does not have."""
        value = to_final(row)
        if self._as_json:
            value = {name: item for name, item in value.items() if item not in (None, "")}
        writer.add(value, row.size)
