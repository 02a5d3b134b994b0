"""The page of an evaluation: figures, problems by difficulty, and responses to read beside their grades."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear import __version__
from megatron_klear.evaluation.results import (
    OUTCOMES,
    BenchmarkResult,
    Judged,
    coverage_lines,
    covered,
    interval,
    percent,
)
from megatron_klear.evaluation.statistics import Estimate
from megatron_klear.observe.page import fill, style_sheet
from megatron_klear.observe.replace import replace_file
from megatron_klear.observe.summary import readable_response
from megatron_klear.observe.theme import DARK_PALETTE, LIGHT_PALETTE

PAGE_FILE = "evaluation.html"

_SHOWN_PER_PROBLEM = 4
_LONGEST_TEXT, _SHORTEST_TEXT, _LONGEST_LABEL = 30_000, 2_000, 200
_PAGE_CHARACTERS = 12_000_000
"""Texts are shortened so far that the page stays about this long; where that is not enough, easy problems are left
out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem as the page shows it."""

    problem_id: str
    text: str
    reference: str


_TEMPLATE = Path(__file__).with_name("page.html.jinja")

_COLORS = {"correct": 2, "wrong": 3, "partial": 6, "malformed": 4, "ungraded": 7}


def write_page(
    path: Path,
    results: Sequence[BenchmarkResult],
    problems: Mapping[str, Sequence[Problem]],
    judged: Mapping[str, Sequence[Judged]],
    *,
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write the page, which needs nothing but itself.

    Args:
        path: of the HTML file.
        results: figures, one per benchmark.
        problems, judged: by the benchmark's name.
        facts: what the figures were made with.
        notes: what a reader must know, such as rows that were left out.

    Raises:
        OSError: if it cannot be written.
    """
    shown = sum(min(_SHOWN_PER_PROBLEM, result.num_responses) * result.num_problems for result in results)
    longest = max(_SHORTEST_TEXT, min(_LONGEST_TEXT, _PAGE_CHARACTERS // max(shown, 1)))
    most = max(1, _PAGE_CHARACTERS // (_SHORTEST_TEXT * _SHOWN_PER_PROBLEM) // max(len(results), 1))
    values = {
        "title": "Evaluation",
        "subtitle": str(facts.get("model", "")),
        "style": style_sheet(LIGHT_PALETTE, DARK_PALETTE),
        "figures": [row for result in results for row in _figures(result)],
        "benchmarks": [
            {
                "name": result.name,
                "problems": _problem_rows(result, problems[result.name], judged.get(result.name, ()), longest, most),
                "left_out": max(0, result.num_problems - result.num_without_response - most),
            }
            for result in results
        ],
        "shown": _SHOWN_PER_PROBLEM,
        "notes": list(notes),
        "incomplete": coverage_lines(results),
        "facts": {name: _spelled(value) for name, value in facts.items()},
        "footer": f"Written by megatron_klear {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    }
    replace_file(path, fill(_TEMPLATE.read_text(encoding="utf-8"), values))


def _figures(result: BenchmarkResult) -> list[dict[str, Any]]:
    metrics = [(result.label, result.avg), *((f"pass@{k}", value) for k, value in result.pass_at_k.items() if k > 1)]
    once = dict.fromkeys(("benchmark", "responses", "tokens", "cut"), "")
    rows = [
        {"metric": metric, **_range(value), "problems": covered(value, result), **once} for metric, value in metrics
    ]
    missing = f" ({result.num_without_response} without response)" if result.num_without_response else ""
    rows[0] |= {
        "benchmark": result.name,
        "problems": f"{covered(result.avg, result)}{missing}",
        "responses": f"{result.num_responses:,}",
        "tokens": "" if result.tokens is None else f"{result.tokens[0]:,.0f}",
        "cut": f"{percent(result.share_cut)} %",
    }
    return rows


def _range(value: Estimate) -> dict[str, Any]:
    known = value.num_problems > 0
    return {
        "mean": percent(value.mean),
        "interval": interval(value),
        "at": f"{100 * value.mean:.2f}" if known else None,
        "low": f"{100 * value.low:.2f}" if known else "",
        "width": f"{100 * (value.high - value.low):.2f}" if known else "",
    }


def _problem_rows(
    result: BenchmarkResult, problems: Sequence[Problem], judged: Sequence[Judged], longest: int, most: int
) -> list[dict[str, Any]]:
    """The hardest problems that have responses, at most `most`, hardest first."""
    by_problem: dict[str, list[Judged]] = defaultdict(list)
    for item in judged:
        by_problem[item.generation.problem_id].append(item)

    def ease(problem: Problem) -> float:
        count = result.problems[problem.problem_id]
        return count.num_correct / count.num_graded if count.num_graded else 2.0

    answered = sorted((problem for problem in problems if problem.problem_id in by_problem), key=ease)
    return [_problem_row(problem, by_problem[problem.problem_id], longest) for problem in answered[:most]]


def _problem_row(problem: Problem, items: Sequence[Judged], longest: int) -> dict[str, Any]:
    numbers = {outcome: sum(item.grade.outcome == outcome for item in items) for outcome in OUTCOMES}
    texts = {"prompt": problem.text, "reference": problem.reference}
    rows = []
    for item in _chosen(items, problem.problem_id):
        made = item.generation
        tokens = "" if made.num_tokens is None else f", {made.num_tokens:,} tokens"
        row = {
            **texts, "response": made.response, "reward": item.grade.reward, "finish_reason": made.finish_reason,
            "outcome": item.grade.outcome, "reason": _label(item.grade.reason, _SHORTEST_TEXT), "index": made.index,
            "length": tokens,
        }  # fmt: skip
        rows.append(readable_response(row, longest=longest, whole="generations.jsonl has them"))
    shown = readable_response(
        {**texts, "response": "", "reward": 0.0, "finish_reason": ""}, longest=longest, whole="the benchmark has them"
    )
    return {
        "id": _label(problem.problem_id, _LONGEST_LABEL),
        "text": shown["prompt"],
        "reference": shown["reference"],
        "counts": ", ".join(f"{number} {outcome}" for outcome, number in numbers.items() if number),
        "parts": [
            {"width": f"{100 * number / len(items):.2f}", "color": _COLORS[outcome]}
            for outcome, number in numbers.items()
            if number
        ],
        "responses": rows,
    }


def _chosen(items: Sequence[Judged], problem_id: str) -> list[Judged]:
    """Some responses: one of every outcome first, then others, drawn by the problem's name, so the same ones again."""
    mixed = sorted(items, key=lambda item: item.generation.index)
    random.Random(problem_id).shuffle(mixed)
    front: dict[str, Judged] = {}
    for item in mixed:
        front.setdefault(item.grade.outcome, item)
    taken = {id(item) for item in front.values()}
    rest = [item for item in mixed if id(item) not in taken]
    chosen = [*front.values(), *rest][:_SHOWN_PER_PROBLEM]
    return sorted(chosen, key=lambda item: item.generation.index)


def _label(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_spelled(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_spelled(item) for item in value)
    return str(value)
