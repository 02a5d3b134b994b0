"""Grading a finished generations file, as a command: figures, files, page and every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klear import evaluate
from megatron_klear.session.run_lock import RunLock

GOOD, BAD = "<think>t</think> \\boxed{4}", "<think>t</think> \\boxed{5}"


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of one command over two benchmarks."""
    here = tmp_path_factory.mktemp("graded")
    text = "<script>alert(1)</script> & \\frac{1}{2}"
    aime = write(
        here / "aime.jsonl",
        {"messages": [{"role": "user", "content": text}], "meta": {"problem": text, "solution": "4"}},
        {"meta": {"problem": "2 + 2?", "solution": "4"}},
        {"meta": {"problem": "nobody answers", "solution": "4"}},
    )
    hmmt = write(here / "hmmt.jsonl", {"id": 9, "problem": "2 + 2?", "solution": "\\boxed{4}"})
    generations = write(
        here / "made.jsonl",
        {"problem_id": "aime:1", "responses": [BAD, GOOD, "</pre><b>no box</b>", BAD]},
        {"problem_id": "aime:2", "responses": [GOOD, GOOD, GOOD, BAD]},
        {"problem_id": "9", "response": GOOD, "num_tokens": 17, "finish_reason": "length"},
        {"problem_id": "9", "response": "unfinished", "num_tokens": 3, "finish_reason": "abort"},
        {"problem_id": "unknown", "response": GOOD},
    )
    status = evaluate.main(["--grade", generations, "--problems", aime, hmmt, "--workers", "1", "--pass-at", "1,2"])
    assert status == 0
    return here / "made-graded"


def test_figures_are_those_worked_out_by_hand(graded: Path) -> None:
    aime, hmmt = json.loads((graded / "results.json").read_text())["benchmarks"]
    assert aime["label"] == "avg@4"
    assert aime["avg"]["mean"] == (1 / 4 + 3 / 4) / 2
    assert aime["pass_at_k"]["2"]["mean"] == pytest.approx((1 - 3 / 6 + 1) / 2)  # C(3,2)/C(4,2) and C(1,2)/C(4,2)
    assert (aime["num_problems"], aime["num_without_response"], aime["num_responses"]) == (3, 1, 8)
    assert aime["outcomes"] == {"correct": 4, "wrong": 4, "partial": 0, "malformed": 0, "ungraded": 0}
    assert aime["tokens"] is None
    # An aborted response is ungraded: it is neither right nor wrong.
    assert hmmt["avg"]["mean"] == 1.0
    assert hmmt["outcomes"]["ungraded"] == 1
    assert hmmt["share_cut"] == 0.5
    assert hmmt["tokens"][0] == 10.0


def test_every_response_has_its_grade_in_a_file(graded: Path) -> None:
    rows = [json.loads(line) for line in (graded / "grades.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    by_key = {(row["benchmark"], row["problem_id"], row["index"]): row for row in rows}
    assert by_key["aime", "aime:1", 1]["outcome"] == "correct"
    assert by_key["aime", "aime:1", 2]["outcome"] == "wrong"
    assert by_key["hmmt", "9", 1]["outcome"] == "ungraded"
    (reject,) = (graded / "rejects.jsonl").read_text().splitlines()
    assert "no problem 'unknown'" in reject


def test_the_page_shows_responses_and_runs_nothing_of_them(graded: Path) -> None:
    page = (graded / "evaluation.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "</pre><b>" not in page
    assert "2 of 3 (1 without response)" in page
    assert page.index("aime:1") < page.index("aime:2")  # hardest first


def test_two_gradings_do_not_write_into_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "p.jsonl", {"id": "1", "problem": "2 + 2?", "answer": "4"})
    made = write(tmp_path / "g.jsonl", {"problem_id": "1", "response": GOOD})
    out = tmp_path / "g-graded"
    out.mkdir()
    other = RunLock(out)
    assert evaluate.main(["--grade", made, "--problems", problems]) == 2
    assert f"--out: {out} is in use by process" in capsys.readouterr().err
    other.release()
    assert evaluate.main(["--grade", made, "--problems", problems]) == 0


def test_a_file_that_covers_some_problems_is_told_and_can_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = write(tmp_path / "p.jsonl", *({"id": str(i), "problem": "2 + 2?", "answer": "4"} for i in range(30)))
    made = write(tmp_path / "g.jsonl", *({"problem_id": str(i), "response": GOOD} for i in range(3)))
    arguments = ["--grade", made, "--problems", problems, "--workers", "1"]
    assert evaluate.main(arguments) == 0
    assert "INCOMPLETE: p: problems covered: avg@1 3 of 30" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "g-graded" / "results.json").read_text())["benchmarks"]
    assert not result["complete"]
    assert (result["avg"]["num_problems"], result["num_problems"]) == (3, 30)
    page = (tmp_path / "g-graded" / "evaluation.html").read_text()
    assert "INCOMPLETE: p: problems covered: avg@1 3 of 30" in page
    assert "3 of 30 (27 without response)" in page
    assert evaluate.main([*arguments, "--require-complete"]) == 2
    assert "INCOMPLETE: p" in capsys.readouterr().err


def test_a_hostile_response_stays_text_on_the_page(tmp_path: Path) -> None:
    bad = '<script>alert(1)</script></pre></details>" onmouseover="alert(2)\' <img src=x onerror=alert(3)>'
    problems = write(tmp_path / "p.jsonl", {"id": bad, "problem": bad, "answer": "4"})
    made = write(tmp_path / "g.jsonl", {"problem_id": bad, "response": f"<think>{bad}</think> {bad}"})
    assert evaluate.main(["--grade", made, "--problems", problems, "--workers", "1"]) == 0
    page = (tmp_path / "g-graded" / "evaluation.html").read_text()
    for raw in ("<script", "</pre></details>&", '" onmouseover', "<img"):
        assert raw not in page
    assert "&lt;img src=x" in page


def test_the_page_stands_whatever_is_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 MB, NUL, halves of surrogate pairs, turned direction, markup of terminals and of templates."""
    hostile = [
        "a\0b",
        "\ud800",
        "\u202e4}{dexob",
        "\u0645\u0631\u062d\u0628\u0627",
        "\x1b[31m",
        "{{ 7 * 7 }}",
        "</script>",
    ]
    problems = write(
        tmp_path / "p[bold][x.jsonl",
        {"id": "<i>" + "y" * 100_000, "problem": "2 + 2 " * 2_000_000, "answer": "4"},
        {"id": "\u202e2", "problem": "$\\frac{2}{1}$ + 2?", "answer": "4"},
    )
    made = write(
        tmp_path / "g.jsonl",
        *({"problem_id": "\u202e2", "response": f"<think>{text}</think>{GOOD}{text}"} for text in hostile),
        {"problem_id": "<i>" + "y" * 100_000, "responses": ["9" * 10_000_000 + GOOD, "\\boxed{" + "(" * 5_000_000]},
    )
    assert evaluate.main(["--grade", made, "--problems", problems, "--workers", "1"]) == 0
    assert "p[bold][x" in capsys.readouterr().out
    out = tmp_path / "g-graded"
    (result,) = json.loads((out / "results.json").read_text())["benchmarks"]
    assert result["num_responses"] == len(hostile) + 2
    page = (out / "evaluation.html").read_bytes()
    assert len(page) < 400_000
    text = page.decode()
    assert not {char for char in text if ord(char) < 32} - {"\n"}
    assert "\u202e" not in text
    assert "<script" not in text
    assert "characters left out; generations.jsonl has them" in text


def test_of_very_many_problems_the_page_shows_the_hardest(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "problem": "2 + 2?" + " word" * 2000, "answer": "4"} for i in range(2000)]
    problems = write(tmp_path / "p.jsonl", *rows)
    made = write(
        tmp_path / "g.jsonl",
        *({"problem_id": f"q{i}", "responses": [BAD if i == 1999 else GOOD]} for i in range(2000)),
    )
    assert evaluate.main(["--grade", made, "--problems", problems, "--workers", "2"]) == 0
    text = (tmp_path / "g-graded" / "evaluation.html").read_text()
    assert len(text) < 25_000_000
    assert text.count('<details class="card problem">') == 1500
    assert text.index("q1999") < text.index("q0<")
    assert "500 easier problems are only in these files." in text


def test_livecodebench_answers_are_run_against_public_and_private_tests(tmp_path: Path) -> None:
    tests = [{"input": f"{i}\n", "output": f"{i + 1}\n", "testtype": "stdin"} for i in range(3)]
    row = {
        "question_id": "abc", "question_content": "Add one.", "starter_code": "", "metadata": "{}",
        "public_test_cases": json.dumps(tests[:1]), "private_test_cases": json.dumps(tests[1:]),
    }  # fmt: skip
    problems = write(tmp_path / "livecodebench.jsonl", row)
    right = "I add.\n```python\nprint(int(input()) + 1)\n```"
    public_only = "```python\nprint(1)\n```"
    generations = write(tmp_path / "made.jsonl", {"problem_id": "abc", "responses": [right, public_only, "none"]})
    arguments = ["--grade", generations, "--problems", problems, "--sandbox", "rlimits", "--workers", "1"]
    assert evaluate.main(arguments) == 0
    (result,) = json.loads((tmp_path / "made-graded" / "results.json").read_text())["benchmarks"]
    assert result["avg"]["mean"] == pytest.approx(1 / 3)  # the share of tests passed is the reward, not the accuracy
    assert result["outcomes"] == {"correct": 1, "wrong": 1, "partial": 1, "malformed": 0, "ungraded": 0}
    assert result["mean_reward"] == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_problems_of_some_contests_are_graded_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])
    row = {"question_content": "Add one.", "public_test_cases": tests, "private_test_cases": "[]"}
    days = ("2024-07-31T00:00:00", "2024-08-01T00:00:00")
    problems = write(tmp_path / "lcb.jsonl", *({**row, "question_id": day[:10], "contest_date": day} for day in days))
    made = write(tmp_path / "g.jsonl", {"problem_id": "2024-08-01", "response": "```python\nprint(2)\n```"})
    arguments = ["--grade", made, "--problems", problems, "--sandbox", "rlimits", "--require-complete"]
    assert evaluate.main(arguments) == 2
    assert "INCOMPLETE: lcb: problems covered: avg@1 1 of 2" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--contests-from", "2024-08-01"]) == 0
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--contests-until", "august"])
    assert "--contests-until: got 'august', must be a day such as" in capsys.readouterr().err


def test_wrong_input_is_told_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "p.jsonl", {"problem": "2 + 2?", "answer": "4"})
    generations = write(tmp_path / "g.jsonl", {"problem_id": "nobody", "response": GOOD})
    for arguments, says in [
        (["--grade", generations, "--problems", str(tmp_path / "none.jsonl")], "none.jsonl: cannot be read"),
        (["--grade", str(tmp_path / "none.jsonl"), "--problems", problems], "none.jsonl: cannot be read"),
        (["--grade", generations, "--problems", problems], "has no problem 'nobody'"),
        (["--grade", generations, "--problems", problems, problems], "would both be called 'p'"),
        (["--grade", generations, "--problems", problems, "--out", problems], "p.jsonl: File exists"),
    ]:
        assert evaluate.main(arguments) == 2, arguments
        assert says in capsys.readouterr().err


def test_generations_are_graded_by_the_rules_of_the_evaluation_that_made_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thinking part, CPU time, memory and interpreter; without them the same answers get other grades."""
    monkeypatch.setenv("COLUMNS", "400")
    tests = [{"input": "", "output": "1\n", "testtype": "stdin"}]
    lcb = {
        "starter_code": "", "metadata": "{}", "public_test_cases": json.dumps(tests), "private_test_cases": "[]",
        "question_content": "Print 1.",
    }  # fmt: skip
    code = write(tmp_path / "lcb.jsonl", {**lcb, "question_id": "c"}, {**lcb, "question_id": "left out"})
    math = write(tmp_path / "aime.jsonl", {"id": "m", "problem": "2 + 2?", "answer": "4"})
    think = "<think>t</think>"
    spin = "import time\nwhile time.process_time() < 1.5: pass\n"
    big = "x = bytearray(300 << 20)\n"
    which = "import sys\nassert sys.flags.no_site\n"
    made = write(
        tmp_path / "g.jsonl",
        {"problem_id": "c", "responses": [f"{think}```python\n{start}print(1)\n```" for start in (which, spin, big)]},
        {"problem_id": "m", "responses": ["\\boxed{4}", f"{think}\\boxed{{4}}"]},
    )
    settings = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "benchmarks": {"files": [code, math], "problems": 1, "pass_at": [1]},
        "sampler": {"hf_dir": "/gone"},
        "reward": {"workers": 1},
        "code_reward": {"sandbox": "rlimits", "cpu_seconds": 1.0, "memory_bytes": 2**28, "workers": 1},
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    arguments = ["--grade", made, "--config", str(config)]
    assert evaluate.main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "thinking part: <think> ... </think> required; math: 5 s of CPU time" in told
    assert "code: soft, 1 s of CPU time and 20 s by the clock per test, 256 MiB, /usr/bin/python3 in rlimits" in told
    out = tmp_path / "g-graded"
    found = json.loads((out / "results.json").read_text())
    lcb_result, aime = found["benchmarks"]
    assert lcb_result["num_problems"] == 1
    assert (lcb_result["outcomes"]["correct"], lcb_result["outcomes"]["wrong"]) == (1, 2)
    assert (aime["outcomes"]["correct"], aime["outcomes"]["malformed"]) == (1, 1)
    assert list(aime["pass_at_k"]) == ["1"]
    reasons = [json.loads(line)["reason"] for line in (out / "grades.jsonl").read_text().splitlines()]
    assert [word in reason for word, reason in zip(("passed all", "CPU time", "memory"), reasons, strict=False)] == [
        True, True, True,
    ]  # fmt: skip
    assert found["facts"]["grading rules"]["code"].startswith("soft, 1 s of CPU time")
    # Settings on the command line count as they do for the evaluation, and options do not contradict them.
    assert evaluate.main([*arguments, "reward.require_think=false", "code_reward.cpu_seconds=5"]) == 0
    lcb_result, aime = json.loads((out / "results.json").read_text())["benchmarks"]
    assert (lcb_result["outcomes"]["correct"], aime["outcomes"]["correct"]) == (2, 2)
    assert evaluate.main([*arguments, "--timeout", "3", "--require-think"]) == 2
    told = capsys.readouterr().err
    assert "--timeout: is given beside --config" in told
    assert "--require-think: is given beside --config" in told
    assert evaluate.main(["--grade", made, "--config", str(config), "code_reward.wall_seconds=0.5"]) == 2
    assert "code_reward.wall_seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--grade", made])
    assert "--problems FILE [FILE ...], --config CONFIG.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--pass-at", "0"], ["--workers", "none"], ["--timeout", "-1"]])
def test_wrong_options_are_told_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        evaluate.main(["--grade", "g", "--problems", "p", *arguments])
    assert leaving.value.code == 2
    assert f"{arguments[0]}: got '{arguments[1]}', must be" in capsys.readouterr().err
