"""Curation of synthetic documents: planted rows found, documents per second beside libraries, memory by input size.

    python benchmarks/curation.py [--documents 20000] [--words 300] [--rounds 3] [--largest 200000]

Needs the extra benchmark-curation (polars, scikit-learn). Each measurement is a process of its own, so that peaks of
memory are its own; times are CPU seconds of one core, since other work on the machine does not add to them. The
libraries hold all documents in memory and write none; the pipeline reads and writes files, notes why each row went, and
could be killed at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from curation_inputs import BENCHMARKS, NGRAM, Planted, write_inputs

PARTS = ("throughput", "memory")
MEASURED = ("read", "dedup", "decontaminate", "export")


def curate(directory: Path, *overrides: str) -> dict[str, Any]:
    """Run the pipeline in this process; returns CPU seconds per stage and of the whole, and its time by the clock."""
    settings = {
        "run": {"dir": str(directory / "run"), "task": "rl", "stages": ["dedup", "decontaminate"]},
        "input": {"files": [str(directory / "input-*.jsonl")], "check_references": False},
        "decontamination": {"benchmarks": [str(directory / f"{name}.jsonl") for name in BENCHMARKS]},
    }
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    from megatron_klear.curate import run

    start, clock = time.process_time(), time.perf_counter()
    assert run([str(config), *overrides]) == 0
    seconds = {"whole": time.process_time() - start, "clock": time.perf_counter() - clock}
    audit = json.loads((directory / "run" / "audit.json").read_text(encoding="utf-8"))
    return seconds | {stage["name"]: stage["cpu_seconds"] for stage in audit["stages"]}


def _texts(directory: Path) -> list[str]:
    rows = (json.loads(line) for file in sorted(directory.glob("input-*.jsonl")) for line in file.open())
    return [row["messages"][0]["content"] for row in rows]


def polars_unique(directory: Path) -> dict[str, Any]:
    """Exact dedup by polars: NFKC, lower case and single spaces as expressions, then `unique`; in memory."""
    import polars as pl

    frame = pl.DataFrame({"text": _texts(directory)})
    start = time.process_time()
    key = pl.col("text").str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    kept = frame.with_columns(key.alias("key")).unique("key", keep="first", maintain_order=True)
    return {"dedup": time.process_time() - start, "kept": len(kept)}


def sklearn_ngrams(directory: Path) -> dict[str, Any]:
    """9-gram overlap by scikit-learn: counts of the benchmarks' n-grams in every document; in memory."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = _texts(directory)
    problems = [json.loads(line)["problem"] for name in BENCHMARKS for line in (directory / f"{name}.jsonl").open()]
    options: dict[str, Any] = {"ngram_range": (NGRAM, NGRAM), "token_pattern": r"[^\W_]+", "strip_accents": None}
    start = time.process_time()
    grams = CountVectorizer(**options).fit(problems).vocabulary_
    shared = CountVectorizer(vocabulary=grams, **options).transform(texts)
    return {"decontaminate": time.process_time() - start, "contaminated": int((shared.sum(axis=1) > 0).sum())}


CONTESTANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "pipeline": curate,
    "polars": polars_unique,
    "scikit-learn": sklearn_ngrams,
}


def measured(name: str, directory: Path, *arguments: str) -> dict[str, Any]:
    """Run a contestant in a process of its own; adds its peak memory in MiB."""
    command = [sys.executable, str(Path(__file__)), "--contestant", name, "--directory", str(directory), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def found_exactly(directory: Path, planted: Planted) -> bool:
    """Whether the pipeline dropped every planted row, for the right reason, and no other."""
    rows = [json.loads(line) for line in (directory / "run" / "dropped.jsonl").open()]
    duplicates = {row["id"] for row in rows if row["reason"] == "duplicate"}
    contaminated = {row["id"]: (row["benchmark"], row["problem"]) for row in rows if row["reason"] == "contaminated"}
    return duplicates == planted.duplicates and contaminated == planted.contaminated


def throughput(documents: int, words: int, num_rounds: int, scratch: Path) -> dict[str, Any]:
    """Documents per CPU second of each stage and of the libraries, in interleaved rounds; the median."""
    directory = scratch / "throughput"
    directory.mkdir()
    planted = write_inputs(directory, documents, words=words, seed=1)
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(num_rounds):
        subprocess.run(["rm", "-rf", str(directory / "run")], check=True)
        rounds.append({name: measured(name, directory) for name in CONTESTANTS})
    exact = found_exactly(directory, planted)

    def rate(name: str, part: str) -> float:
        return round(documents / sorted(r[name][part] for r in rounds)[num_rounds // 2])

    table = {f"pipeline {stage}": rate("pipeline", stage) for stage in (*MEASURED, "whole")}
    table["polars unique (dedup)"] = rate("polars", "dedup")
    table["scikit-learn CountVectorizer (decontaminate)"] = rate("scikit-learn", "decontaminate")
    size = sum(file.stat().st_size for file in directory.glob("input-*.jsonl"))
    print(f"{documents:,} documents of about {words} words, {size / 2**20:.0f} MiB")
    print(
        f"planted: {len(planted.duplicates)} duplicates, {len(planted.contaminated)} contaminated; "
        f"found all and no other: {exact}"
    )
    for name, value in table.items():
        print(f"  {name:<46}{value:>10,.0f} documents per CPU second")
    return {
        "documents": documents,
        "words": words,
        "input_mebibytes": round(size / 2**20, 1),
        "planted_duplicates": len(planted.duplicates),
        "planted_contaminated": len(planted.contaminated),
        "found_every_planted_row_and_no_other": exact,
        "documents_per_cpu_second": table,
        "peak_mebibytes": {name: round(rounds[-1][name]["peak_mebibytes"]) for name in CONTESTANTS},
        "polars_kept": rounds[-1]["polars"]["kept"],
        "sklearn_contaminated": rounds[-1]["scikit-learn"]["contaminated"],
        "rounds": rounds,
    }


def memory(largest: int, scratch: Path) -> list[dict[str, Any]]:
    """Peak memory of the pipeline as the input grows tenfold, twice."""
    rows = []
    print("\nmemory of the pipeline by input")
    for documents in (largest // 100, largest // 10, largest):
        directory = scratch / f"memory-{documents}"
        directory.mkdir()
        planted = write_inputs(directory, documents, words=120, seed=2)
        result = measured("pipeline", directory)
        size = sum(file.stat().st_size for file in directory.glob("input-*.jsonl")) / 2**20
        row = {
            "documents": documents,
            "input_mebibytes": round(size, 1),
            "peak_mebibytes": round(result["peak_mebibytes"], 1),
            "cpu_seconds": round(result["whole"], 1),
            "found_every_planted_row_and_no_other": found_exactly(directory, planted),
        }
        rows.append(row)
        print(f"  {documents:>8,} documents {size:>8.1f} MiB input {row['peak_mebibytes']:>8.1f} MiB peak")
        subprocess.run(["rm", "-rf", str(directory)], check=True)
    return rows


def main() -> int:
    """Measure, print, write; exit status 1 if a planted row was missed or another dropped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curation.json")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest stays as it is"
    )
    parser.add_argument("--contestant", choices=CONTESTANTS)
    parser.add_argument("--directory", type=Path)
    options, overrides = parser.parse_known_args()
    if options.contestant:
        result = CONTESTANTS[options.contestant](options.directory, *overrides)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result | {"peak_mebibytes": peak}))
        return 0
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if "throughput" in options.parts:
            found["throughput"] = throughput(options.documents, options.words, options.rounds, scratch)
        if "memory" in options.parts:
            found["memory"] = memory(options.largest, scratch)
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[1],
        "python": platform.python_version(),
    }
    options.out.write_text(json.dumps({**found, **machine}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    judged = [found["throughput"], *found.get("memory", [])] if "throughput" in found else found["memory"]
    return 0 if all(part["found_every_planted_row_and_no_other"] for part in judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
