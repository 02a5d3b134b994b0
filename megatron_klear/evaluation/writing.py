"""The files of an evaluation: generations.jsonl, grades.jsonl, results.json and the page, in one directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import PromptRow
from megatron_klear.evaluation.generations import Generation
from megatron_klear.evaluation.page import PAGE_FILE, Problem, write_page
from megatron_klear.evaluation.results import BenchmarkResult, Judged, as_json, summarize
from megatron_klear.observe.replace import replace_file

GENERATIONS_FILE, GRADES_FILE, RESULTS_FILE, REJECTS_FILE = (
    "generations.jsonl", "grades.jsonl", "results.json", "rejects.jsonl",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A named set of problems."""

    name: str
    rows: tuple[PromptRow, ...]


def write_evaluation(
    directory: Path,
    benchmarks: Sequence[Benchmark],
    judged: Mapping[str, Sequence[Judged]],
    *,
    facts: Mapping[str, Any],
    seed: int,
    ks: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> list[BenchmarkResult]:
    """Work out all figures and write grades.jsonl, results.json and the page; each file whole or not at all.

    Args:
        directory: made if it is not there.
        benchmarks: what was asked.
        judged: responses with grades, by the benchmark's name.
        facts: what the figures were made with.
        seed: of the bootstrap.
        ks: values of k for pass@k; empty takes powers of two up to the fewest responses that a problem has.
        notes: what a reader must know.

    Raises:
        OSError: if something cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    results = []
    for benchmark in benchmarks:
        items = judged.get(benchmark.name, ())
        ids = [row.row_id for row in benchmark.rows]
        results.append(summarize(benchmark.name, ids, items, ks=ks, seed=seed))
    lines = (json.dumps(_grade_row(name, item)) + "\n" for name, items in judged.items() for item in items)
    replace_file(directory / GRADES_FILE, "".join(lines))
    replace_file(
        directory / RESULTS_FILE, json.dumps(as_json(results, {**facts, "notes": list(notes)}), indent=1) + "\n"
    )
    problems = {benchmark.name: [_problem(row) for row in benchmark.rows] for benchmark in benchmarks}
    write_page(directory / PAGE_FILE, results, problems, judged, facts=facts, notes=notes)
    return results


def _grade_row(name: str, item: Judged) -> dict[str, Any]:
    made: Generation = item.generation
    return {
        "benchmark": name, "problem_id": made.problem_id, "index": made.index, "outcome": item.grade.outcome,
        "reward": item.grade.reward, "reason": item.grade.reason, "finish_reason": made.finish_reason,
        "num_tokens": made.num_tokens,
    }  # fmt: skip


def _problem(row: PromptRow) -> Problem:
    text = "\n\n".join(message["content"] for message in row.messages if message["role"] != "system")
    return Problem(problem_id=row.row_id, text=text, reference=row.reference)
