"""The reward linter finds each fault that it is meant to find, and none in sound settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
from megatron_klear.data.rows import PromptRow
from megatron_klear.records import Domain, Grade
from megatron_klear.reward import GradeRequest
from megatron_klear.reward.probes import Probe, boxed
from megatron_klear.session import reward_lint, reward_lint_command
from megatron_klear.session.grading import Graders
from megatron_klear.session.reward_lint import LintRow, lint_rewards

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


@pytest.fixture
def no_built_in_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what another test looks at, for its time."""
    monkeypatch.setattr(reward_lint, "built_in", lambda domains: [])


def failed(found: list[LintRow]) -> dict[str, str]:
    return {entry.check: entry.found for entry in found if not entry.passed}


def test_sound_rewards_pass_every_check(graders: Graders) -> None:
    found = lint_rewards(SETTINGS, SOUND, graders)
    assert failed(found) == {}
    assert len(found) == 16


@pytest.mark.parametrize(
    ("rows", "check", "named"),
    [
        ([row("a", "math", "5", "Q"), row("b", "math", "6", "Q")], "same answer key", "a, b"),
        ([row("a", "math", "???")], "math: at most 1.0%", "a (the reference cannot be read"),
        ([row("a", "code", '{"kind": "stdin", "tests": []}')], "tests can be used", "a (the tests cannot be used"),
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
    no_built_in_probes: None, graders: Graders, rows: list[tuple[str, PromptRow]], check: str, named: str
) -> None:
    faults = failed(lint_rewards(SETTINGS, rows, graders))
    (text,) = [found for name, found in faults.items() if check in name]
    assert named in text


def test_a_filter_by_correctness_is_found(no_built_in_probes: None, graders: Graders) -> None:
    """The trap of the paper's release: groups that differ only in partial scores are dropped."""
    settings = Settings(run=RUN, tokenizer=TOKENIZER, algorithm=AlgorithmSettings(filter_metric="correctness"))
    faults = failed(lint_rewards(settings, SOUND, graders))
    assert list(faults) == ["groups are filtered by the reward that they are trained on"]
    (text,) = faults.values()
    assert "drops groups of different partial scores" in text
    assert "drops groups of partial and wrong" in text
    off = Settings(run=RUN, tokenizer=TOKENIZER, algorithm=AlgorithmSettings(filter_zero_advantage=False))
    assert failed(lint_rewards(off, SOUND, graders)) == {}


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
def test_faults_of_graders_are_found(graders: Graders, fault: str, checks: list[str]) -> None:
    faults = failed(lint_rewards(SETTINGS, SOUND, Wrong(graders, fault)))
    for check in checks:
        assert any(check in name for name in faults), faults


def test_probes_of_the_user(no_built_in_probes: None, graders: Graders) -> None:
    probes = [Probe("mine", "math", boxed("5"), "5", ("wrong",))]
    faults = failed(lint_rewards(SETTINGS, SOUND, graders, probes=probes))
    assert "mine: correct (equal to the reference), must be wrong" in faults["known answers come out as they are known"]


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Arguments of the command for a small run's settings."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
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
    assert "8 of 8 checks of the rewards passed" in capsys.readouterr().out
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
