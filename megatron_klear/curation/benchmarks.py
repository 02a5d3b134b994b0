"""Benchmark problems and their n-grams, which no training prompt may share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_klear.curation.text import ngrams, words
from megatron_klear.data.index.parts import plan_parts, read_part
from megatron_klear.data.jsonl import JsonObject
from megatron_klear.data.overlap import text_key
from megatron_klear.data.problems import Problems

TEXT_KEYS = ("problem", "question", "question_content", "prompt", "text", "input")
"""Where a published benchmark has its problem, apart from `messages`; the first of them that is there counts."""

_COLUMNS = ("id", "question_id", "task_id", "messages", "meta", *TEXT_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """An n-gram that a prompt shares with a benchmark.

    Attributes:
        benchmark: name of the benchmark.
        problem: id of its problem, or the line where there is none.
        ngram: the words; the whole text of a problem that is shorter than n words.
    """

    benchmark: str
    problem: str
    ngram: str


@dataclass(slots=True)
class BenchmarkIndex:
    """The n-grams of all benchmarks; it grows with the benchmarks and not with the data.

    A problem of fewer than n words overlaps with a prompt only if the two are equal but for case, spacing and Unicode
    variants; words alone would take `4 - 1` for `4 + 1`.

    Attributes:
        n: words of an n-gram.
        grams: n-gram -> (benchmark, problem) that had it first.
        whole: key of the text of a shorter problem -> the same.
        whitelist: n-grams that are no overlap.
        problems: problems by benchmark.
    """

    n: int
    grams: dict[str, tuple[str, str]] = field(default_factory=dict)
    whole: dict[str, tuple[str, str]] = field(default_factory=dict)
    whitelist: set[str] = field(default_factory=set)
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, benchmark: str, problem: str, text: str) -> None:
        """Take in a problem."""
        self.problems[benchmark] = self.problems.get(benchmark, 0) + 1
        of = words(text)
        owner = (benchmark, problem)
        if len(of) < self.n:
            self.whole.setdefault(text_key(text), owner)
        for gram in ngrams(of, self.n):
            self.grams.setdefault(gram, owner)

    def overlaps(self, text: str) -> tuple[list[Overlap], list[Overlap]]:
        """What a prompt shares with benchmarks, in the order of the prompt: what counts, and what is whitelisted."""
        of = words(text)
        if len(of) < self.n:
            owner = self.whole.get(text_key(text))
            found = {} if owner is None else {text: owner}
        else:
            mine = ngrams(of, self.n)
            if self.grams.keys().isdisjoint(mine):
                return [], []
            found = {gram: self.grams[gram] for gram in mine if gram in self.grams}
        counting: list[Overlap] = []
        excused: list[Overlap] = []
        for gram, (benchmark, problem) in found.items():
            overlap = Overlap(benchmark=benchmark, problem=problem, ngram=gram)
            (excused if gram in self.whitelist else counting).append(overlap)
        return counting, excused


def whitelist_grams(texts: Iterable[str], n: int, problems: Problems, *, setting: str) -> set[str]:
    """The n-grams of whitelisted texts; a text that is shorter than n words is noted as a problem."""
    allowed: set[str] = set()
    for text in texts:
        grams = ngrams(words(text), n)
        if not grams:
            problems.add(setting, f"{text!r} has {len(words(text))} words, an entry needs {n} at least")
        allowed.update(grams)
    return allowed


def read_benchmarks(files: Sequence[str], index: BenchmarkIndex, problems: Problems) -> None:
    """Take in all problems of benchmark files; here nothing may be wrong, since what is not read is not kept out."""
    parts = plan_parts(files, setting="decontamination.benchmarks", required=())
    for part in parts:
        name = files[part.file]
        benchmark = Path(name).stem
        for line, value in enumerate(read_part(part, name, columns=_COLUMNS), start=1):
            if isinstance(value, str):
                problems.add(f"{name}:{line}", value)
            elif value is not None:
                _take(value, f"{name}:{line}", benchmark, index, problems)


def _take(value: JsonObject, where: str, benchmark: str, index: BenchmarkIndex, problems: Problems) -> None:
    text = problem_text(value)
    if text is None:
        keys = ", ".join(("messages", *TEXT_KEYS))
        problems.add(where, f"holds no problem text; it is looked for in {keys}")
        return
    named: Any = next((value[key] for key in ("id", "question_id", "task_id") if value.get(key) is not None), None)
    index.add(benchmark, str(named) if named is not None else where, text)


def problem_text(value: JsonObject) -> str | None:
    """The problem of a benchmark's row: what its messages ask, or the first of `TEXT_KEYS`, also in `meta` (AIME)."""
    messages = value.get("messages")
    if isinstance(messages, list):
        asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        texts = [text for text in asked if isinstance(text, str) and text.strip()]
        if texts:
            return "\n\n".join(texts)
    meta = value.get("meta")
    places = [value, meta] if isinstance(meta, dict) else [value]
    found = (place.get(key) for place in places for key in TEXT_KEYS)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)
