"""Synthetic documents with planted duplicates and planted contamination, and the lists of what was planted."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NGRAM = 9
BENCHMARKS = ("olympiad", "contest")
_SYLLABLES = ("ba", "ke", "lo", "mu", "ni", "ra", "so", "ti", "vu", "ze", "pra", "sko", "tle", "wim", "gax", "hoy")


def row(number: int, text: str = "", **more: Any) -> dict[str, Any]:
    """A math row with everything that is needed."""
    asked = {"role": "user", "content": text or f"What is {number} plus {number} in base ten, dear friend?"}
    return {"id": f"r{number}", "domain": "math", "messages": [asked], "reference": str(2 * number), **more}


@dataclass(slots=True)
class Planted:
    """Ids of what was planted.

    Attributes:
        duplicates: rows whose prompt an earlier row has, in another spelling.
        contaminated: row -> (benchmark, problem) that it shares at least 9 words in a row with.
        innocent: rows that look like one of these and are none: one word differs, or only 8 words are shared.
    """

    duplicates: set[str] = field(default_factory=set)
    contaminated: dict[str, tuple[str, str]] = field(default_factory=dict)
    innocent: set[str] = field(default_factory=set)


def write_inputs(directory: Path, documents: int, *, words: int = 120, seed: int = 0, files: int = 3) -> Planted:
    """Write input-*.jsonl and one file per benchmark.

    One document in twenty is a duplicate, one in twenty is contaminated, as many only look like it. Of its own, a
    document's words are drawn from a vocabulary of thousands, so that 9 in a row never meet by chance.

    Args:
        directory: where to.
        documents: how many rows.
        words: of a document, about.
        seed: of everything.
        files: number of input files.
    """
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) for _ in range(20_000)]
    problems = {name: [rng.choices(vocabulary, k=rng.randint(30, 90)) for _ in range(100)] for name in BENCHMARKS}
    for name, listed in problems.items():
        rows = ({"id": f"{name}-{i}", "problem": _sentence(p, rng)} for i, p in enumerate(listed))
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planted = Planted()
    outs = [(directory / f"input-{number}.jsonl").open("w") for number in range(files)]
    try:
        for number, (row_id, text) in enumerate(_documents(documents, words, vocabulary, problems, planted, rng)):
            row = {
                "id": row_id,
                "domain": "math",
                "source": f"source-{number % 4}",
                "reference": str(number % 97),
                "messages": [{"role": "user", "content": text}],
            }
            # In the order of the files, which is the order of the rows: a duplicate comes after its original.
            outs[number * files // documents].write(json.dumps(row) + "\n")
    finally:
        for out in outs:
            out.close()
    return planted


def _documents(
    count: int, words: int, vocabulary: list[str], problems: dict[str, list[list[str]]], planted: Planted,
    rng: random.Random,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    kept: list[list[str]] = []
    for number in range(count):
        row_id = f"doc-{number}"
        own = rng.choices(vocabulary, k=rng.randint(words * 2 // 3, words * 4 // 3))
        kind = rng.random()
        if kind < 0.05 and kept:
            planted.duplicates.add(row_id)
            yield row_id, _respelled(" ".join(rng.choice(kept)), rng)
            continue
        if kind < 0.10:
            name = rng.choice(BENCHMARKS)
            place = rng.randrange(len(problems[name]))
            problem = problems[name][place]
            length = rng.randint(NGRAM, min(len(problem), 40))
            start = rng.randint(0, len(problem) - length)
            at = rng.randint(0, len(own))
            own[at:at] = problem[start : start + length]
            planted.contaminated[row_id] = (name, f"{name}-{place}")
            yield row_id, _sentence(own, rng)
            continue
        if kind < 0.125 and kept:
            own = list(rng.choice(kept))
            own[rng.randrange(len(own))] = f"otherwise{number}"  # of its own: two changed alike would be equal
            planted.innocent.add(row_id)
        elif kind < 0.15:
            problem = rng.choice(problems[rng.choice(BENCHMARKS)])
            start = rng.randint(0, len(problem) - 17)
            at = rng.randint(0, len(own))
            # Eight words twice, with strangers around: a neighbour could by chance be the ninth.
            shared = [*problem[start : start + 8], "stranger", *problem[start + 9 : start + 17]]
            own[at:at] = ["stranger", *shared, "stranger"]
            planted.innocent.add(row_id)
        # Plain spaces: what is duplicated later is respelled from these words.
        if len(kept) < 2000:
            kept.append(own)
        yield row_id, " ".join(own)


def _sentence(words: list[str], rng: random.Random) -> str:
    """The words with capitals and punctuation strewn in, which separates words and changes none."""
    marks = ["", "", "", "", ",", ".", ":", " --", " $", ")", "\n"]
    return " ".join((word.upper() if rng.random() < 0.1 else word) + rng.choice(marks) for word in words)


def _respelled(text: str, rng: random.Random) -> str:
    """The same text in another spelling: case, spacing, and wide letters."""
    pieces = []
    for word in text.split():
        chance = rng.random()
        if chance < 0.1:
            word = word.capitalize()
        elif chance < 0.15:
            word = "".join(chr(ord(c) + 0xFEE0) for c in word)
            assert unicodedata.normalize("NFKC", word).isascii()
        pieces.append(word)
    return rng.choice(["  ", "\n", "\t "]).join(pieces)
