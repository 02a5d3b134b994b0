"""Benchmark problems and their n-grams, which no training prompt may share."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_klear.curation.text import UNITS_PER_WORD, comes_to, ngrams, runs, seen, units, words
from megatron_klear.data.index.parts import plan_parts, read_part
from megatron_klear.data.jsonl import JsonObject
from megatron_klear.data.overlap import text_key
from megatron_klear.data.problems import Problems

TEXT_KEYS = ("problem", "question", "question_content", "prompt", "text", "input")
"""Where a published benchmark has its problem, apart from `messages`; the first of them that is there counts."""

_ID_KEYS = ("id", "question_id", "task_id", "problem_idx")
_COLUMNS = (*_ID_KEYS, "ID", "messages", "meta", *TEXT_KEYS, *map(str.capitalize, TEXT_KEYS))
_LINE_BYTES = 1 << 30
"""Longest line of a benchmark: LiveCodeBench's hold their packed tests, and none may be left out."""


Owners = tuple[tuple[str, str], ...]
"""Benchmark and problem, for each of some benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """An n-gram that a prompt shares with a benchmark.

    Attributes:
        benchmark: name of the benchmark.
        problem: id of its problem, or the line where there is none.
        ngram: the words; the whole text of a problem that is shorter than n words.
        is_short: whether it is such a problem.
    """

    benchmark: str
    problem: str
    ngram: str
    is_short: bool = False


@dataclass(slots=True)
class BenchmarkIndex:
    """The n-grams of all benchmarks; it grows with the benchmarks and not with the data.

    A problem of fewer than n words overlaps with a prompt that holds all its words in a row, if it has `short_words`
    words and `short_characters` letters and digits. One shorter still must be the whole prompt, but for case, spacing,
    Unicode variants and a last full stop or question mark; words alone would take `4 - 1` for `4 + 1`.

    Attributes:
        n: words of an n-gram; `text` says what a word is where none are told apart by spaces.
        short_words, short_characters: what a shorter problem must have to be looked for within prompts.
        short: all words of a shorter problem that has them -> its owners, see below.
        grams: n-gram -> (benchmark, problem) of each benchmark that has it, with the problem that had it first there.
            Nearly all have one owner, in a tuple that all n-grams of the problem share.
        whole: key of the text of a shorter problem -> the same.
        whitelist: n-grams that are no overlap.
        problems: problems by benchmark.
    """

    n: int
    short_words: int = 4
    short_characters: int = 20
    short: dict[str, Owners] = field(default_factory=dict)
    grams: dict[str, Owners] = field(default_factory=dict)
    whole: dict[str, Owners] = field(default_factory=dict)
    whitelist: set[str] = field(default_factory=set)
    problems: dict[str, int] = field(default_factory=dict)
    _short_lengths: set[int] = field(default_factory=set)

    def add(self, benchmark: str, problem: str, text: str) -> None:
        """Take in a problem."""
        self.problems[benchmark] = self.problems.get(benchmark, 0) + 1
        of = words(text)
        owner = ((benchmark, problem),)
        if not comes_to(of, self.n):
            _own(self.whole, _whole_key(text), owner)
            if comes_to(of, self.short_words) and sum(map(len, of)) >= self.short_characters:
                _own(self.short, " ".join(of), owner)
                self._short_lengths.add(len(of))
        for gram in ngrams(of, self.n):
            _own(self.grams, gram, owner)

    def overlaps(self, text: str) -> tuple[list[Overlap], list[Overlap]]:
        """What a prompt shares with benchmarks, n-grams first: what counts, and what is whitelisted.

        What several benchmarks have is there once for each.
        """
        of = words(text)
        found = {gram: (self.grams[gram], False) for gram in ngrams(of, self.n) if gram in self.grams}
        for length in sorted(self._short_lengths):
            found.update((gram, (self.short[gram], True)) for gram in runs(of, length) if gram in self.short)
        if not found and not comes_to(of, self.n):
            owners = self.whole.get(_whole_key(text))
            found = {} if owners is None else {text: (owners, True)}
        counting: list[Overlap] = []
        excused: list[Overlap] = []
        for gram, (owners, is_short) in found.items():
            (excused if gram in self.whitelist else counting).extend(
                Overlap(benchmark=benchmark, problem=problem, ngram=gram, is_short=is_short)
                for benchmark, problem in owners
            )
        return counting, excused


def _own(of: dict[str, Owners], key: str, owner: Owners) -> None:
    """Add an owner, unless its benchmark has one already."""
    owners = of.setdefault(key, owner)
    if owners is not owner and all(benchmark != owner[0][0] for benchmark, _ in owners):
        of[key] = owners + owner


def _whole_key(text: str) -> str:
    return text_key(seen(text).rstrip().rstrip(".?\u3002\uff1f"))


def whitelist_grams(texts: Iterable[str], index: BenchmarkIndex, problems: Problems, *, setting: str) -> set[str]:
    """The n-grams of whitelisted texts; a shorter one excuses the short problem that it is.

    A text that is too short for that is noted as a problem.
    """
    allowed: set[str] = set()
    for text in texts:
        of = words(text)
        least = min(index.n, index.short_words)
        if not comes_to(of, least):
            got = f"{units(of) / UNITS_PER_WORD:.3g} words"
            problems.add(setting, f"{text!r} has {got}, an entry needs {least} at least")
        allowed.update(ngrams(of, index.n) if comes_to(of, index.n) else [" ".join(of)])
    return allowed


def read_benchmarks(files: Sequence[str], index: BenchmarkIndex, problems: Problems) -> None:
    """Take in all problems of benchmark files; here nothing may be wrong, since what is not read is not kept out."""
    # Each file is one part: a line that is counted from the start of a part must be the file's.
    parts = plan_parts(files, sys.maxsize, setting="decontamination.benchmarks", required=())
    for part in parts:
        name = files[part.file]
        benchmark = Path(name).stem
        for line, value in enumerate(read_part(part, name, _LINE_BYTES, columns=_COLUMNS), start=1):
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
    plain = {**{key.lower(): item for key, item in value.items()}, **value}
    named: Any = next((plain[key] for key in _ID_KEYS if plain.get(key) is not None), None)
    index.add(benchmark, str(named) if named is not None else where, text)


def problem_text(value: JsonObject) -> str | None:
    """The problem of a benchmark's row: what its messages ask, or the first of `TEXT_KEYS`, also in `meta` (AIME).

    Some published files have these keys with capitals.
    """
    messages = value.get("messages")
    if isinstance(messages, list):
        asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        texts = [text for text in asked if isinstance(text, str) and text.strip()]
        if texts:
            return "\n\n".join(texts)
    meta = value.get("meta")
    places = [
        {**{key.lower(): item for key, item in place.items()}, **place}
        for place in (value, meta)
        if isinstance(place, dict)
    ]
    found = (place.get(key) for place in places for key in TEXT_KEYS)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)
