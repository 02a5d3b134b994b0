"""The reward linter finds each fault that it is meant to find, and none in sound settings."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_klear import verify
from megatron_klear.config import (
    AlgorithmSettings,
    CodeRewardSettings,
    RewardSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.data import ChatTokenizer, load_chat_tokenizer
from megatron_klear.data.rows import PromptRow
from megatron_klear.records import Domain, Grade
from megatron_klear.reward import GradeRequest, code_worker, parse_problem
from megatron_klear.reward.probes import Probe, boxed
from megatron_klear.session import reward_lint, reward_lint_command
from megatron_klear.session.answer_keys import AnswerKeys, survey
from megatron_klear.session.grading import Graders
from megatron_klear.session.reward_lint import LintRow, lint_rewards
from tests.chat_tokenizers import OPENING_TEMPLATE, write_tokenizer

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")

RUN, TOKENIZER = RunSettings(dir="r"), TokenizerSettings(dir="t")
SETTINGS = Settings(
    run=RUN,
    tokenizer=TOKENIZER,
    reward=RewardSettings(workers=2, timeout_seconds=30.0),
    code_reward=CodeRewardSettings(workers=2, cpu_seconds=1.0, wall_seconds=20.0),
)

DOUBLE: dict[str, Any] = {
    "kind": "call", "function": "f", "tests": [{"args": [n], "output": 2 * n} for n in range(3)],
    "solution": "def f(x):\n    return 2 * x",
}  # fmt: skip


def row(name: str, domain: Domain, reference: str, question: str = "") -> tuple[str, PromptRow]:
    message = {"role": "user", "content": question or name}
    return "data.prompts", PromptRow(row_id=name, domain=domain, messages=(message,), reference=reference, where="f:1")


SOUND = [row("m", "math", r"\frac{3}{4}"), row("w", "math", "(C)"), row("c", "code", json.dumps(DOUBLE))]


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    made = Graders(SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_chat_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def no_built_in_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what another test looks at, for its time."""
    monkeypatch.setattr(reward_lint, "built_in", lambda domains: [])


def failed(found: list[LintRow]) -> dict[str, str]:
    return {entry.check: entry.found for entry in found if not entry.passed}


def test_sound_rewards_pass_every_check(graders: Graders, chat: ChatTokenizer) -> None:
    found = lint_rewards(SETTINGS, SOUND, graders, chat)
    assert failed(found) == {}
    assert len(found) == 16


def test_what_the_chat_template_opens_is_a_part_of_every_response(
    graders: Graders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chat = load_chat_tokenizer(write_tokenizer(tmp_path / "tokenizer", OPENING_TEMPLATE))
    probes = [
        Probe("begins in its thinking", "math", r"so</think>\boxed{5}", "5", ("correct",)),
        Probe("never ends it", "math", r"so \boxed{5}", "5", ("malformed",)),
        Probe("with what the prompt opens", "math", r"<think>so</think>\boxed{5}", "5", ("correct",)),
    ]
    found = lint_rewards(SETTINGS, SOUND, graders, chat, probes=probes)
    assert failed(found) == {}
    check = "math: a right answer in the form of the chat template is correct"
    (told,) = [row.found for row in found if row.check == check]
    assert told == r"the template opens '<think>\n'; correct (equal to the reference)"
    # As a run that forgets it would grade.
    monkeypatch.setattr(ChatTokenizer, "response_text", lambda self, ids: self.decode(ids))
    assert "malformed (<think> is missing)" in failed(lint_rewards(SETTINGS, SOUND, graders, chat))[check]


@pytest.mark.parametrize(
    ("rows", "check", "named"),
    [
        ([row("a", "math", "???")], "math: at most 1.0%", "a (the reference cannot be read"),
        (
            [row("a", "code", json.dumps({**DOUBLE, "solution": "def f(x):\n    return x"}))],
            "code: the answer key itself is correct", "a (partial: passed 1 of 3",
        ),
        (
            [row("a", "code", '{"kind": "assert", "tests": ["x = 1"]}')],
            "code: another answer is not correct", "a (passed all 1 tests)",
        ),
    ],
)  # fmt: skip
def test_faults_of_the_data_are_named(
    no_built_in_probes: None,
    graders: Graders,
    chat: ChatTokenizer,
    rows: list[tuple[str, PromptRow]],
    check: str,
    named: str,
) -> None:
    faults = failed(lint_rewards(SETTINGS, rows, graders, chat))
    (text,) = [found for name, found in faults.items() if check in name]
    assert named in text


def test_a_filter_by_correctness_is_found(no_built_in_probes: None, graders: Graders, chat: ChatTokenizer) -> None:
    """The trap of the paper's release: groups that differ only in partial scores are dropped."""
    settings = replace(SETTINGS, algorithm=AlgorithmSettings(filter_metric="correctness"))
    faults = failed(lint_rewards(settings, SOUND, graders, chat))
    assert list(faults) == ["groups are filtered by the reward that they are trained on"]
    (text,) = faults.values()
    assert "drops groups of different partial scores" in text
    assert "drops groups of partial and wrong" in text
    off = replace(SETTINGS, algorithm=AlgorithmSettings(filter_zero_advantage=False))
    assert failed(lint_rewards(off, SOUND, graders, chat)) == {}


class Wrong(Graders):
    """Graders with one fault each."""

    def __init__(self, true: Graders, fault: str) -> None:
        self._true, self._fault = true, fault

    def grade_many(self, requests: Any) -> list[Grade]:
        grades = self._true.grade_many(requests)
        return [self._changed(request, grade) for (_, request), grade in zip(requests, grades, strict=True)]

    def _changed(self, request: GradeRequest, grade: Grade) -> Grade:
        if self._fault == "cut off above wrong" and request.finish_reason == "length":
            return Grade(outcome=grade.outcome, reward=grade.reward + 0.5)
        if self._fault == "partial as -1 and +1" and grade.outcome == "partial":
            return Grade(outcome="partial", reward=0.0)
        if self._fault == "everything is right":
            return Grade(outcome="correct", reward=1.0)
        if self._fault == "nothing is graded":
            return Grade(outcome="ungraded", reward=0.0)
        return grade


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        ("cut off above wrong", ["code: nothing cut off", "math: nothing cut off"]),
        ("partial as -1 and +1", ["code: half of the tests"]),
        ("everything is right", ["right answers earn more", "another answer is not correct", "known answers"]),
        ("nothing is graded", ["right answers earn more", "are ungraded", "known answers"]),
    ],
)
def test_faults_of_graders_are_found(graders: Graders, chat: ChatTokenizer, fault: str, checks: list[str]) -> None:
    faults = failed(lint_rewards(SETTINGS, SOUND, Wrong(graders, fault), chat))
    for check in checks:
        assert any(check in name for name in faults), faults


def test_probes_of_the_user(no_built_in_probes: None, graders: Graders, chat: ChatTokenizer) -> None:
    probes = [Probe("mine", "math", boxed("5"), "5", ("wrong",))]
    faults = failed(lint_rewards(SETTINGS, SOUND, graders, chat, probes=probes))
    assert "mine: correct (equal to the reference), must be wrong" in faults["known answers come out as they are known"]


class DrawsTests:
    """A worker's tests as a careless grader has them: not all of them, and others for every response."""

    def __init__(self, fault: str) -> None:
        self._fault, self._random, self._calls = fault, random.Random(0), itertools.count()

    def __call__(self, reference: str) -> Any:
        problem = parse_problem(reference)
        tests = list(problem.tests)
        if self._fault == "drawn for each response":
            tests = self._random.sample(tests, min(2, len(tests)))
        elif self._fault == "in another order":
            self._random.shuffle(tests)
        elif self._fault == "cut to the first two":
            tests = tests[:2]
        elif self._fault == "fewer from some moment on" and next(self._calls) > 10:
            tests = tests[:-1]
        elif self._fault == "another tolerance":
            return replace(problem, tolerance=1.0 if next(self._calls) % 2 else problem.tolerance)
        elif self._fault == "another limit":
            return replace(problem, cpu_seconds=1.0 + next(self._calls) % 2)
        return replace(problem, tests=tests)


TEST_FAULTS = (
    "drawn for each response", "in another order", "cut to the first two", "fewer from some moment on",
    "another tolerance", "another limit",
)  # fmt: skip


@pytest.mark.parametrize("fault", TEST_FAULTS)
def test_other_tests_within_a_group_are_found(
    no_built_in_probes: None, graders: Graders, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    tests = [{"args": [n], "output": 2 * n} for n in range(6)]
    rows = [row("c", "code", json.dumps(DOUBLE | {"tests": tests}))]
    check = "code: all responses of a group meet the same tests"
    assert check not in failed(lint_rewards(SETTINGS, rows, graders, chat))
    monkeypatch.setattr(code_worker, "parse_problem", DrawsTests(fault))
    text = failed(lint_rewards(SETTINGS, rows, graders, chat))[check]
    assert "c (has 6 tests" in text
    assert "whose responses met other tests" in text


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Arguments of the command for a small run's settings."""
    write_tokenizer(tmp_path / "tokenizer")
    prompt = {"id": "a", "domain": "math", "messages": [{"role": "user", "content": "Q"}], "reference": "5"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"run: {{dir: {tmp_path / 'run'}}}\ntokenizer: {{dir: {tmp_path / 'tokenizer'}}}\n"
        f"data: {{prompts: [{tmp_path / 'prompts.jsonl'}]}}\nmodel: {{preset: qwen3-0.6b}}\n"
        "reward: {workers: 2, timeout_seconds: 30}\n"
    )
    return ["--rewards", str(tmp_path / "config.yaml")]


def test_the_command(config: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify.main(config) == 0, capsys.readouterr()
    assert "9 of 9 checks of the rewards passed" in capsys.readouterr().out
    assert verify.main([*config, "algorithm.filter_metric=correctness"]) == 1
    assert "FAIL" in capsys.readouterr().out
    probes = tmp_path / "probes.jsonl"
    probes.write_text('{"domain": "math", "response": "x", "reference": "5", "expected": "correct"}\n')
    assert verify.main([*config, "--probes", str(probes)]) == 1
    assert "must be correct" in capsys.readouterr().out


def test_the_command_finds_what_the_settings_refuse(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*config, "reward.malformed=0", "code_reward.malformed=0.5"]) == 1
    out = capsys.readouterr().out
    assert "reward.malformed" in out
    assert "code_reward.malformed" in out
    assert "0 of 2 checks" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.lr=fast"], ["optimizer.lr"]),
        (["--probes", "missing.jsonl"], ["missing.jsonl", "cannot be read"]),
        (["data.prompts=[missing.jsonl]", "reward.malformed=0"], ["data.prompts", "reward.malformed"]),
    ],
)
def test_bad_input_of_the_command(
    config: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert verify.main([*config, *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)


def test_bad_probes_are_told_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    file.write_text('{"domain": "x", "response": 1, "reference": 2, "expected": "good", "finish_reason": "no"}\n[]\n')
    with pytest.raises(reward_lint_command.DataError) as caught:
        reward_lint_command._read_probes(str(file))
    for words in ("domain must be", "response must be", "reference must be", "expected must be", "finish_reason must"):
        assert words in str(caught.value)
    assert "must be a JSON object" in str(caught.value)


def prompt(name: str, reference: Any = "5", question: str = "", domain: Domain = "math") -> dict[str, Any]:
    messages = [{"role": "user", "content": question or name}]
    return {"id": name, "domain": domain, "messages": messages, "reference": reference}


def write_prompts(config: list[str], rows: list[dict[str, Any]]) -> None:
    (Path(config[1]).parent / "prompts.jsonl").write_text("".join(json.dumps(value) + "\n" for value in rows))


ASKED_TWICE = "a problem has the same answer key or tests wherever it occurs"


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """What the command's table says of each check: what was found, and pass or FAIL."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    rows: list[list[str]] = []
    for cell in cells:
        if cell[-1]:
            rows.append(cell)
        else:  # a folded line of the row above
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cell, strict=True)]
    return {check: (found, result) for check, found, result in rows}


@pytest.mark.parametrize(
    ("fault", "rows", "arguments", "check"),
    [
        ("forgets what is opened", [prompt("a")], [], "math: a right answer in the form of the chat template"),
        ("", [prompt("a")], ["algorithm.filter_metric=correctness"], "groups are filtered by the reward"),
        ("cut off above wrong", [prompt("a")], [], "math: nothing cut off"),
        ("partial as -1 and +1", [prompt("c", DOUBLE, domain="code")], [], "code: half of the tests passed"),
        ("drawn", [prompt("c", DOUBLE, domain="code")], [], "code: all responses of a group meet the same tests"),
        ("", [prompt("a", "???"), prompt("b")], ["--max-ungraded", "0.4"], "math: at most 40.0% of the problems"),
        ("everything is right", [prompt("a")], [], "math: another answer is not correct"),
        ("everything is right", [prompt("a")], [], "known answers come out as they are known"),
        ("", [prompt("a"), prompt("b", "6", " a")], [], ASKED_TWICE),
        ("", [prompt("c", {"kind": "stdin", "tests": []}, domain="code")], [], "code: tests can be used"),
        ("", [prompt("c", DOUBLE | {"solution": "x"}, domain="code")], [], "code: the answer key itself is correct"),
    ],
)  # fmt: skip
def test_every_check_of_the_command_can_fail(
    config: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str,
    rows: list[dict[str, Any]], arguments: list[str], check: str,
) -> None:  # fmt: skip
    write_prompts(config, rows)
    monkeypatch.setenv("COLUMNS", "400")
    if fault == "drawn":
        monkeypatch.setattr(code_worker, "parse_problem", DrawsTests("drawn for each response"))
    elif fault == "forgets what is opened":
        write_tokenizer(Path(config[1]).parent / "tokenizer", OPENING_TEMPLATE)
        monkeypatch.setattr(ChatTokenizer, "response_text", lambda self, ids: self.decode(ids))
    elif fault:
        grade_many = Graders.grade_many
        changed = Wrong.__new__(Wrong)
        changed._fault = fault

        def faulty(self: Graders, requests: Any) -> list[Grade]:
            pairs = zip(requests, grade_many(self, requests), strict=True)
            return [changed._changed(request, grade) for (_, request), grade in pairs]

        monkeypatch.setattr(Graders, "grade_many", faulty)
    assert verify.main([*config, *arguments]) == 1
    found = results(capsys)
    (result,) = [result for name, (_, result) in found.items() if name.startswith(check)]
    assert result == "FAIL", found


def test_a_problem_asked_twice_is_found_among_all_rows(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where neither of the two is graded."""
    rows = [prompt(f"r{n}") for n in range(200)]
    rows[101]["messages"], rows[101]["reference"] = rows[33]["messages"], "6"
    write_prompts(config, rows)
    assert verify.main([*config, "--max-rows", "2"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 200 problems graded" in out
    assert "1 with different keys: r33, r101" in out


def test_rows_to_grade_are_taken_evenly() -> None:
    with AnswerKeys(8) as keys:
        for number in range(100):
            keys.add(*row(f"r{number}", "math", "5"))
        assert [entry.row_id for _, entry in keys.sample()] == [f"r{16 * n}" for n in range(7)]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            out.writelines(json.dumps(prompt(f"r{n}", question=f"{n} " + "word " * 40)) + "\n" for n in range(count))
        data = replace(SETTINGS.data, prompts=(str(file),))
        tracemalloc.start()
        with AnswerKeys(100) as keys:
            survey(replace(SETTINGS, data=data), keys)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert keys.questions == count
    assert peaks[1] < 1.5 * peaks[0] + 100_000
