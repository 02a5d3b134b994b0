"""The audit of a run: audit.json, audit.html, and every rejected and dropped row with its reason."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klear import __version__
from megatron_klear.config import dump_settings
from megatron_klear.config.curation import CurationSettings
from megatron_klear.curation.audit_page import TEMPLATE
from megatron_klear.curation.audit_plots import audit_charts
from megatron_klear.curation.files import SPELL_OUT, write_json
from megatron_klear.observe.page import fill, style_sheet
from megatron_klear.observe.readable import byte_size, duration
from megatron_klear.observe.replace import replace_file
from megatron_klear.observe.theme import DARK_PALETTE, LIGHT_PALETTE

if TYPE_CHECKING:
    from megatron_klear.curation.pipeline import StageRecord

_SHOWN_KEYS = 25
_TITLES = {
    "read": "Read and checked",
    "dedup": "Exact duplicates of prompts",
    "decontaminate": "Overlap with benchmarks",
    "sources": "Best sources",
    "select": "K-Center greedy selection",
    "tests": "Number of tests",
    "respond": "Teacher's responses",
    "difficulty": "Difficulty",
    "correctness": "Responses to keep",
    "solvable": "Solved by the teacher",
    "export": "Result",
}


def write_audit(records: Sequence[StageRecord], settings: CurationSettings) -> Path:
    """Write audit.json, audit.html, rejects.jsonl and dropped.jsonl; returns the page's path."""
    root = Path(settings.run.dir)
    for kind in ("rejects", "dropped"):
        _concatenate(records, kind, root / f"{kind}.jsonl")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stages = [
        {
            "name": r.name,
            "units": r.units,
            "kept_units": r.kept_units,
            "seconds": round(r.seconds, 3),
            "cpu_seconds": round(r.cpu_seconds, 3),
            **r.audit.to_object(),
        }
        for r in records
    ]
    result = [os.path.relpath(path, root.resolve()) for path in records[-1].files]
    write_json(root / "audit.json", {"task": settings.run.task, "stages": stages, "result": result, "peak_bytes": peak})
    values = {
        "title": f"Curation for {'fine-tuning' if settings.run.task == 'sft' else 'reinforcement learning'}",
        "subtitle": str(root),
        "style": style_sheet(LIGHT_PALETTE, DARK_PALETTE),
        "tiles": _tiles(records, peak),
        "charts": audit_charts(records, _TITLES),
        "stages": [_stage_rows(record) for record in records],
        "settings": dump_settings(settings),
        "footer": f"Written by megatron_klear {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    }
    page = root / "audit.html"
    replace_file(page, fill(TEMPLATE, values))
    return page


def _concatenate(records: Sequence[StageRecord], kind: str, target: Path) -> None:
    """Put the logs of all units into one file, each line with the name of its stage."""
    fresh = target.with_name(f".{target.name}.part")
    with fresh.open("w", encoding="utf-8", errors=SPELL_OUT) as out:
        for record in records:
            for path in sorted((record.directory / "log").glob(f"*-{kind}.jsonl")):
                with path.open(encoding="utf-8") as file:
                    for line in file:
                        value = {**json.loads(line), "stage": record.name}
                        out.write(json.dumps(value, ensure_ascii=False) + "\n")
    os.replace(fresh, target)


def _tiles(records: Sequence[StageRecord], peak: int) -> list[dict[str, str]]:
    first, last = records[0].audit, records[-1].audit
    rejected = sum(sum(r.audit.rejected.values()) for r in records)
    dropped = sum(sum(r.audit.dropped.values()) for r in records)
    seconds = sum(r.seconds for r in records)
    kept = sum(r.kept_units for r in records)
    return [
        {"label": "Rows in", "value": f"{first.rows_in:,}", "unit": "", "detail": "of all input files"},
        {"label": "Rows out", "value": f"{last.rows_out:,}", "unit": "", "detail": "in result/"},
        {"label": "Dropped by a rule", "value": f"{dropped:,}", "unit": "", "detail": "all in dropped.jsonl"},
        {"label": "Rejected", "value": f"{rejected:,}", "unit": "", "detail": "all in rejects.jsonl"},
        {
            "label": "Work",
            "value": duration(seconds),
            "unit": "",
            "detail": f"{kept} of {sum(r.units for r in records)} units kept from before",
        },
        {"label": "Peak memory", "value": byte_size(peak), "unit": "", "detail": "of the main process"},
    ]


def _stage_rows(record: StageRecord) -> dict[str, Any]:
    audit = record.audit
    tables = [
        {"title": title, "rows": _top(counts), "more": max(len(counts) - _SHOWN_KEYS, 0)}
        for title, counts in sorted(audit.tables.items())
    ]
    reasons = [(reason, count, "dropped") for reason, count in audit.dropped.most_common()]
    reasons += [(reason, count, "rejected") for reason, count in audit.rejected.most_common()]
    return {
        "name": record.name,
        "title": _TITLES[record.name],
        "rows_in": f"{audit.rows_in:,}",
        "rows_out": f"{audit.rows_out:,}",
        "seconds": f"{record.seconds:.1f} s",
        "rate": f"{audit.rows_in / record.seconds:,.0f} rows/s" if record.seconds else "",
        "reasons": [{"reason": reason, "count": f"{count:,}", "kind": kind} for reason, count, kind in reasons],
        "tables": tables,
        "examples": [{"reason": reason, "rows": rows} for reason, rows in audit.examples.items()],
    }


def _top(counts: Counter[str]) -> list[dict[str, str]]:
    return [{"key": key, "count": f"{count:,}"} for key, count in counts.most_common(_SHOWN_KEYS)]
