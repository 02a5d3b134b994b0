"""Evaluation: published benchmarks, generations files, avg@n and pass@k with intervals, a page to read."""

from __future__ import annotations

from megatron_klear.evaluation.generations import Generation, Rejects, read_generations, write_generations
from megatron_klear.evaluation.grading import grading_rules, judge, matched
from megatron_klear.evaluation.published import Contests, benchmark_name, read_benchmark
from megatron_klear.evaluation.results import BenchmarkResult, Judged, as_json, results_table, summarize
from megatron_klear.evaluation.writing import Benchmark, write_evaluation

__all__ = [
    "Benchmark",
    "BenchmarkResult",
    "Contests",
    "Generation",
    "Judged",
    "Rejects",
    "as_json",
    "benchmark_name",
    "grading_rules",
    "judge",
    "matched",
    "read_benchmark",
    "read_generations",
    "results_table",
    "summarize",
    "write_evaluation",
    "write_generations",
]
