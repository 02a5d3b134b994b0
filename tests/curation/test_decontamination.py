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
from megatron_klear.curation.benchmarks import BenchmarkIndex, read_benchmarks
from megatron_klear.curation.text import words
from megatron_klear.data.problems import Problems
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
    if any(unicodedata.category(c) in ("Lo", "Cf") for c in unicodedata.normalize("NFKC", text)):
        return  # scripts without spaces and unseen characters have tests of their own
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
    index = BenchmarkIndex(n=n, short_words=n)
    index.add("b", "p", " ".join(problem))
    is_short = len(problem) < n
    counting, excused = index.overlaps(("  " if is_short else ", ").join(prompt).upper())
    expected = problem == prompt if is_short else share(problem, prompt, n)
    assert bool(counting) == expected
    assert not excused


UNSPACED = {"\u0e01": 2, "\u1780": 2, "\u0e81": 2, "\u1000": 3, "\u3042": 3, "\u6c42": 4, "x": 6, "\u00e9t\u00e9": 6}


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    problem=st.lists(st.sampled_from(list(UNSPACED)), min_size=1, max_size=24),
    prompt=st.lists(st.sampled_from(list(UNSPACED)), min_size=1, max_size=30),
    cut=st.integers(0, 24),
    n=st.integers(2, 4),
)
def test_letters_of_scripts_without_spaces_count_as_parts_of_words(
    problem: list[str], prompt: list[str], cut: int, n: int
) -> None:
    """Every shared run against its size in sixths of a word, by search over all pairs of places."""
    prompt = prompt + problem[cut:]

    def longest() -> int:
        best = 0
        for a in range(len(problem)):
            for b in range(len(prompt)):
                size = 0
                for left, right in zip(problem[a:], prompt[b:], strict=False):
                    if left != right:
                        break
                    size += UNSPACED[left]
                    best = max(best, size)
        return best

    if sum(UNSPACED[item] for item in problem) < 6 * n:
        return  # a short problem, which has a rule of its own
    index = BenchmarkIndex(n=n, short_words=n)
    index.add("b", "p", " ".join(problem))
    assert bool(index.overlaps(" ".join(prompt))[0]) == (longest() >= 6 * n)


# A problem as an exercise book has it, and another one that shares its phrases with it: at least nine letters in a row.
EXERCISES = {
    "Thai": (
        "\u0e08\u0e07\u0e2b\u0e32\u0e04\u0e48\u0e32\u0e02\u0e2d\u0e07\u0e08\u0e33\u0e19\u0e27\u0e19\u0e40\u0e15\u0e47\u0e21"
        "\u0e1a\u0e27\u0e01\u0e17\u0e31\u0e49\u0e07\u0e2b\u0e21\u0e14\u0e17\u0e35\u0e48\u0e2b\u0e32\u0e23\u0e14\u0e49\u0e27\u0e22"
        "\u0e40\u0e08\u0e47\u0e14\u0e25\u0e07\u0e15\u0e31\u0e27",
        "\u0e08\u0e07\u0e2b\u0e32\u0e04\u0e48\u0e32\u0e02\u0e2d\u0e07\u0e1f\u0e31\u0e07\u0e01\u0e4c\u0e0a\u0e31\u0e19\u0e19\u0e35\u0e49",
    ),
    "Lao": (
        "\u0e88\u0ebb\u0ec8\u0e87\u0e8a\u0ead\u0e81\u0eab\u0eb2\u0e84\u0ec8\u0eb2\u0e82\u0ead\u0e87\u0e88\u0eb3\u0e99\u0ea7\u0e99"
        "\u0e96\u0ec9\u0ea7\u0e99\u0e97\u0eb1\u0e87\u0edd\u0ebb\u0e94\u0e97\u0eb5\u0ec8\u0eab\u0eb2\u0e99\u0e94\u0ec9\u0ea7\u0e8d"
        "\u0ec0\u0e88\u0eb1\u0e94\u0e82\u0eb2\u0e94",
        "\u0e88\u0ebb\u0ec8\u0e87\u0e8a\u0ead\u0e81\u0eab\u0eb2\u0e84\u0ec8\u0eb2\u0e82\u0ead\u0e87\u0eaa\u0ebb\u0ea1\u0e9c\u0ebb\u0e99",
    ),
    "Khmer": (
        "\u1785\u17bc\u179a\u179a\u1780\u178f\u1798\u17d2\u179b\u17c3\u1793\u17c3\u1785\u17c6\u1793\u17bd\u1793\u1782\u178f\u17cb"
        "\u179c\u17b7\u1787\u17d2\u1787\u1798\u17b6\u1793\u1791\u17b6\u17c6\u1784\u17a2\u179f\u17cb\u178a\u17c2\u179b"
        "\u1785\u17c2\u1780\u178a\u17b6\u1785\u17cb\u1793\u17b9\u1784\u1794\u17d2\u179a\u17b6\u17c6\u1796\u17b8\u179a",
        "\u1785\u17bc\u179a\u179a\u1780\u178f\u1798\u17d2\u179b\u17c3\u1793\u17c3\u1785\u17c6\u1793\u17bd\u1793"
        "\u1780\u17bb\u17c6\u1795\u17d2\u179b\u17b7\u1785",
    ),
    "Burmese": (
        "\u1001\u102f\u1014\u1005\u103a\u1016\u103c\u1004\u103a\u1037\u1005\u102c\u1038\u104d\u1015\u103c\u1010\u103a\u101e\u1031\u102c"
        "\u1021\u1015\u1031\u102b\u1004\u103a\u1038\u1000\u102d\u1014\u103a\u1038\u1015\u103c\u100a\u103a\u1037\u1021\u102c\u1038"
        "\u101c\u102f\u1036\u1038\u1000\u102d\u102f\u101b\u103e\u102c\u1015\u102b",
        "\u1001\u102f\u1014\u1005\u103a\u1016\u103c\u1004\u103a\u1037\u1005\u102c\u1038\u104d\u1015\u103c\u1010\u103a\u101e\u1031\u102c"
        "\u101c\u1030\u1019\u103b\u102c\u1038",
    ),
    "Chinese": (
        "\u4e0b\u5217\u8bf4\u6cd5\u4e2d\u6b63\u786e\u7684\u662f\u6240\u6709\u88ab\u4e03\u6574\u9664\u7684\u6b63\u6574\u6570\u90fd\u662f\u5947\u6570",
        "\u4e0b\u5217\u8bf4\u6cd5\u4e2d\u6b63\u786e\u7684\u662f\u4e09\u89d2\u5f62\u5185\u89d2\u548c\u4e3a\u76f4\u89d2",
    ),
    "Japanese": (
        "\u6b21\u306e\u6570\u306e\u3046\u3061\u306e\u4e2d\u3067\u4e03\u3067\u5272\u308a\u5207\u308c\u308b\u3082\u306e\u3092\u3059\u3079\u3066\u6c42\u3081\u306a\u3055\u3044",
        "\u6b21\u306e\u6570\u306e\u3046\u3061\u306e\u4e2d\u3067\u6700\u5927\u306e\u3082\u306e\u306f\u3069\u308c\u304b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", EXERCISES)
def test_phrases_of_scripts_without_spaces_are_no_overlap_and_sentences_are(language: str) -> None:
    problem, other = EXERCISES[language]
    assert share(words(problem), words(other), 9)  # nine letters, which once were enough
    index = BenchmarkIndex(n=9)
    index.add("b", "p", problem)
    assert not index.overlaps(other)[0]
    assert index.overlaps(f"{other} {problem}!")[0]


def test_marks_that_are_vowels_belong_to_words() -> None:
    """Hindi, whose words are told apart by spaces and have marks inside; x-bar; Hebrew with points and without."""
    hindi = (
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0932\u093f\u0916\u093e \u0939\u0941\u0906 "
        "\u092f\u0939 \u092a\u094d\u0930\u0936\u094d\u0928 \u0938\u0930\u0932 \u0939\u0948"
    )
    assert words(hindi) == hindi.split()
    assert words("x\u0304 + p\u0337r\u0337ime_1") == ["x", "prime", "1"]
    assert words("\u05e0\u05b4\u05e7\u05bc\u05d5\u05bc\u05d3") == words("\u05e0\u05e7\u05d5\u05d3") != []
    index = BenchmarkIndex(n=9)
    index.add(
        "b",
        "p",
        hindi + " \u0914\u0930 \u0907\u0938\u0915\u093e \u0909\u0924\u094d\u0924\u0930 \u0915\u094d\u092f\u093e",
    )
    assert not index.overlaps(hindi + " \u0928\u0939\u0940\u0902")[0]  # eight words in common
    assert index.overlaps(hindi + " \u0914\u0930")[0]


def test_short_problems_are_told_apart_by_what_stands_between_words() -> None:
    index = BenchmarkIndex(n=9)
    index.add("b", "p", "4 - 1 =")
    assert not index.overlaps("4 + 1 =")[0]
    assert index.overlaps(" 4  -\t1 =")[0][0].problem == "p"


def test_unseen_characters_do_not_split_words() -> None:
    assert words("nu\u200bm\u00adber\ufe0f e\u2060\u0301 \u0645\u06cc\u200c\u062e") == [
        "number",
        "\u00e9",
        "\u0645\u06cc\u062e",
    ]


@pytest.mark.parametrize(
    "text", ["\U00020000\U0003134a", "\u0e01\u0e02", "\u0e81\u0e82", "\u1780\u1781", "\u1000\u1001"]
)
def test_every_script_without_spaces_gives_a_word_per_letter(text: str) -> None:
    assert words(text) == list(text)


def test_the_katakana_middle_dot_is_no_word() -> None:
    assert words("\u30a2\u30fb\u30a4") == ["\u30a2", "\u30a4"]


SHORT = "Find the sum of all primes below 97."


@pytest.mark.parametrize(
    ("prompt", "is_found"),
    [
        (SHORT + " Put your final answer in \\boxed{}.", True),
        (SHORT[:-1], True),
        ("Now: find the SUM of all pri\u00admes below 97", True),
        ("Find the sum of all primes below 971. Put your final answer in \\boxed{}.", False),
        ("Xfind the sum of all primes below 97, and no more", False),
        ("4 - 1 = and so on, since words alone are few", False),
        ("4 - 1", False),
    ],
)
def test_a_short_problem_is_found_inside_a_prompt(prompt: str, is_found: bool) -> None:
    index = BenchmarkIndex(n=9)
    index.add("b", "short", SHORT)
    index.add("b", "shorter", "4 - 1 =")
    found = index.overlaps(prompt)[0]
    assert [(f.problem, f.ngram, f.is_short) for f in found] == (
        [("short", "find the sum of all primes below 97", True)] if is_found else []
    )


def test_short_problems_are_counted_apart_and_all_counts_add_up(run_curation: RunCuration, tmp_path: Path) -> None:
    file = tmp_path / "aime.jsonl"
    file.write_text(json.dumps({"id": "p", "problem": SHORT}) + "\n")
    rows: list[Any] = [
        row(1, SHORT + " Think."), row(2, "harmless"), row(3, "harmless"), "{", {"id": "bad"}, "[]", "\u0000",
        row(4, "also harmless"), row(5, ""),
    ]  # fmt: skip
    done = run_curation(
        rows,
        stages=("dedup", "decontaminate"),
        decontamination={"benchmarks": [str(file)]},
        input={"max_reject_share": 1.0},
    )
    tables = done.audit("decontaminate")["tables"]
    assert tables["short benchmark problems in prompts"] == {"aime: find the sum of all primes below 97": 1}
    stages = json.loads((done.root / "audit.json").read_text())["stages"]
    for stage in stages:
        gone = sum(stage["dropped"].values()) + sum(stage["rejected"].values())
        assert stage["rows_in"] == stage["rows_out"] + gone, stage["name"]
    assert stages[0]["rows_in"] == len(rows)
    assert len(rows) == len(done.rows) + len(done.dropped) + len(done.rejects)


def test_a_row_counts_for_every_benchmark_that_has_what_it_shares(run_curation: RunCuration, tmp_path: Path) -> None:
    long = "A bag holds three red balls and four blue balls; what is the chance of two red ones"
    other = "Twelve people sit around a table and each shakes hands with the neighbours at both sides"
    files = []
    for name, problems in {"first": [long, SHORT, "4 - 1 ="], "second": [other, SHORT, long, long, "4 - 1 ="]}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"id": f"{name}{i}", "problem": p}) + "\n" for i, p in enumerate(problems)))
        files.append(str(file))
    rows = [row(1, long), row(2, other), row(3, SHORT + " Think."), row(4, "4 - 1 ="), row(5, "harmless")]
    done = run_curation(rows, stages=("decontaminate",), decontamination={"benchmarks": files})
    tables = done.audit("decontaminate")["tables"]
    assert tables["contaminated rows by benchmark"] == {"first": 3, "second": 4}
    found = {r["id"]: r for r in done.dropped}
    assert (found["r1"]["benchmark"], found["r1"]["problem"]) == ("first", "first0")
    assert found["r1"]["shared_ngrams"] == len(words(long)) - 8
    index = BenchmarkIndex(n=9)
    for number in range(3):
        index.add("a", f"p{number}", long)
        index.add("b", f"p{number}", long)
    assert {o for owners in index.grams.values() for o in owners} == {("a", "p0"), ("b", "p0")}


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


def test_benchmarks_are_read_as_they_are_published(run_curation: RunCuration, tmp_path: Path) -> None:
    """LiveCodeBench's lines hold packed tests, many MB each; some files of AIME have keys with capitals."""
    asked = "Takahashi has a string of lowercase letters and wants the longest palindrome of it."
    shorter = {"question_id": "abc0_a", "question_content": "Print one line that says hello.", "private_test_cases": ""}
    long = {"question_id": "abc1_a", "question_content": asked, "private_test_cases": "A" * (9 << 20)}
    livecode = tmp_path / "livecodebench.jsonl"
    livecode.write_text("".join(json.dumps(r) + "\n" for r in (shorter, long, {**long, "question_id": None})))
    aime = tmp_path / "aime.jsonl"
    maxwell = "Every morning Aya goes for a walk of nine kilometres and stops at a coffee shop."
    aime.write_text(json.dumps({"ID": "2024-I-1", "Problem": maxwell, "Solution": "s", "Answer": 204}) + "\n")
    done = run_curation(
        [row(1, f"Now then: {asked}"), row(2, maxwell), row(3, "something else entirely")],
        stages=("decontaminate",),
        decontamination={"benchmarks": [str(livecode), str(aime)]},
    )
    assert done.ids == ["r3"]
    assert {r["id"]: (r["benchmark"], r["problem"]) for r in done.dropped} == {
        "r1": ("livecodebench", "abc1_a"), "r2": ("aime", "2024-I-1"),
    }  # fmt: skip


def test_a_benchmark_in_many_parts_names_the_lines_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "big.jsonl"
    with file.open("w") as out:
        for number in range(9):  # 72 MB: more than one part of what is tokenized
            out.write(json.dumps({"problem": f"problem {'abcdefghi'[number]} " * 9, "tests": "A" * (8 << 20)}) + "\n")
    index, problems = BenchmarkIndex(n=9), Problems("benchmarks")
    read_benchmarks([str(file)], index, problems)
    problems.raise_if_any()
    assert index.overlaps("problem i " * 9)[0][0].problem == f"{file}:9"


def test_half_a_surrogate_pair_in_a_benchmark_is_told_in_the_logs(run_curation: RunCuration, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"id": "\ud800", "problem": "one two three four five six seven eight nine"}) + "\n")
    done = run_curation(
        [row(1, "one two three four five six seven eight nine"), row(2, "x")],
        stages=("decontaminate",), decontamination={"benchmarks": [str(file)]},
    )  # fmt: skip
    assert [r["problem"] for r in done.dropped] == ["\ud800"]
    assert done.audit("decontaminate")["examples"]["contaminated"][0]["detail"].count("\ud800") == 1


def test_what_cannot_be_read_of_a_benchmark_stops_the_run(run_curation: RunCuration, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"problem": "fine enough"}\n{"answer": 3}\n{\n')
    settings = {"benchmarks": [str(file)], "whitelist": ["too short"]}
    with pytest.raises(DataError) as caught:
        run_curation([row(1)], stages=("decontaminate",), decontamination=settings)
    text = str(caught.value)
    assert "'too short' has 2 words, an entry needs 4 at least" in text
    assert f"{file}:2: holds no problem text" in text
    assert f"{file}:3: is not JSON" in text
