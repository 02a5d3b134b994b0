"""Overlaps against a search that shares no code with the implementation."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.curation_inputs import row
from megatron_klear.curation.benchmarks import BenchmarkIndex
from megatron_klear.curation.text import words
from megatron_klear.errors import DataError

RunCuration = Callable[..., Any]
WORDS = ["let", "a", "b", "c", "be", "the", "sum", "of", "x", "and", "y", "find", "all", "real", "n", "such", "that"]


def plain_words(text: str) -> list[str]:
    """Words, letter by letter."""
    found, word = [], ""
    for char in unicodedata.normalize("NFKC", text).casefold():
        if char.isalnum():
            word += char
        else:
            found.append(word)
            word = ""
    return [w for w in [*found, word] if w]


def share(left: list[str], right: list[str], n: int) -> bool:
    """Whether two texts share n words in a row, by sliding one along the other."""
    for shift in range(-len(right), len(left)):
        run = 0
        for i, word in enumerate(left):
            run = run + 1 if 0 <= i - shift < len(right) and right[i - shift] == word else 0
            if run >= n:
                return True
    return False


@given(text=st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me", "Nl", "No"]), max_size=60))
def test_words_are_runs_of_letters_and_digits(text: str) -> None:
    if any("\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in
           unicodedata.normalize("NFKC", text)):  # fmt: skip
        return
    assert words(text) == plain_words(text)


def test_unspaced_scripts_give_a_word_per_character() -> None:
    assert words("求x的值。 ÀB\uff12") == ["求", "x", "的", "值", "àb2"]


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    problem=st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=14),
    prompt=st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=20),
    n=st.integers(2, 9),
)
def test_overlap_is_n_words_in_a_row_or_all_of_a_shorter_problem(problem: list[str], prompt: list[str], n: int) -> None:
    index = BenchmarkIndex(n=n)
    index.add("b", "p", " ".join(problem))
    is_short = len(problem) < n
    counting, excused = index.overlaps(("  " if is_short else ", ").join(prompt).upper())
    expected = problem == prompt if is_short else share(problem, prompt, n)
    assert bool(counting) == expected
    assert not excused


def test_short_problems_are_told_apart_by_what_stands_between_words() -> None:
    index = BenchmarkIndex(n=9)
    index.add("b", "p", "4 - 1 =")
    assert not index.overlaps("4 + 1 =")[0]
    assert index.overlaps(" 4  -\t1 =")[0][0].problem == "p"


BOILERPLATE = "where m and n are relatively prime positive integers find m plus n"


@pytest.fixture
def benchmark_file(tmp_path: Path) -> str:
    """Two problems in the shapes in which AIME and LiveCodeBench are published."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"A fair die is rolled. The answer is m/n, {BOILERPLATE}."}],
            "meta": {},
        },
        {"question_id": "q7", "question_content": "You are given an array of n integers; print the largest one."},
    ]
    path = tmp_path / "aime.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_the_whitelist_excuses_n_grams_and_its_loss_is_told(run_curation: RunCuration, benchmark_file: str) -> None:
    rows = [
        row(1, f"Pat draws two cards. The chance equals m/n, {BOILERPLATE}!"),
        row(2, f"Say: a FAIR die is rolled; the answer is m / n -- {BOILERPLATE}"),
        row(3, "Given are two arrays. You are given an array of n integers print THE largest."),
        row(4, "something else entirely"),
    ]
    stages = ("decontaminate",)
    strict = run_curation(rows, stages=stages, decontamination={"benchmarks": [benchmark_file]})
    assert strict.ids == ["r4"]
    found = {r["id"]: r for r in strict.dropped}
    assert found["r1"]["benchmark"] == "aime"
    assert found["r1"]["problem"] == f"{benchmark_file}:1"
    assert found["r1"]["ngram"] == "m n where m and n are relatively prime"
    assert found["r3"] | {"ngram": "", "shared_ngrams": 0} == {
        "id": "r3", "file": found["r3"]["file"], "line": 3, "reason": "contaminated", "benchmark": "aime",
        "problem": "q7", "ngram": "", "shared_ngrams": 0, "stage": "decontaminate",
    }  # fmt: skip
    assert found["r3"]["ngram"] == "you are given an array of n integers print"
    eased = run_curation(
        rows, stages=stages,
        decontamination={"benchmarks": [benchmark_file], "whitelist": ["m/n, " + BOILERPLATE]},
    )  # fmt: skip
    assert eased.ids == ["r1", "r4"]
    audit = eased.audit("decontaminate")
    assert sum(audit["tables"]["rows kept by the whitelist, by n-gram"].values()) == 1
    assert [example["id"] for example in audit["examples"]["kept by the whitelist"]] == ["r1"]
    assert audit["tables"]["contaminated rows by benchmark"] == {"aime": 2}


def test_what_cannot_be_read_of_a_benchmark_stops_the_run(run_curation: RunCuration, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"problem": "fine enough"}\n{"answer": 3}\n{\n')
    settings = {"benchmarks": [str(file)], "whitelist": ["too short"]}
    with pytest.raises(DataError) as caught:
        run_curation([row(1)], stages=("decontaminate",), decontamination=settings)
    text = str(caught.value)
    assert "'too short' has 2 words, an entry needs 9 at least" in text
    assert f"{file}:2: holds no problem text" in text
    assert f"{file}:3: is not JSON" in text
