"""RL on code problems, through the real entry: sandboxes, partial rewards, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.rollout.ledger import GroupFilter, LedgerReader
from tests.e2e.conftest import ROOT, Start

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap; bash tests/run.sh installs it")

CONFIG = "examples/quickstart_rl.yaml"
# So small a model writes no program; what it can learn is to keep the right form, which is worth something here.
CODE = ["code_reward.malformed=-1.0", "code_reward.workers=2", "checkpoint.every_steps=2", "evaluation.at_end=false"]


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of the quickstart, every other one asked as a code problem of real tests."""
    out = tmp_path_factory.mktemp("code") / "codeio.jsonl"
    subprocess.run(
        [sys.executable, "examples/codeio_problems.py", "--out", str(out), "--problems", "4"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    references = [json.loads(line)["reference"] for line in out.read_text().splitlines()]
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        if number % 2:
            row.update(domain="code", reference=references[number % len(references)])
    prompts = out.with_name("prompts.jsonl")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts


def test_math_and_code_are_trained_on_together(start: Start, rl_overrides, mixed: Path, tmp_path: Path) -> None:
    overrides = [*rl_overrides("code"), *CODE, f"data.prompts=[{mixed}]", "rl.steps=3"]
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait() == [0, 0], launch.output()
    with LedgerReader(tmp_path / "code" / "ledger.sqlite") as reader:
        assert reader.trained_not_once() == []
        groups = [group for step in reader.steps() for group in reader.groups_of_step(step)]
        assert {group.prompt.domain for group in groups} == {"math", "code"}
        grades = [g for group in groups if group.prompt.domain == "code" for g in group.grades.values()]
        assert len(list(reader.response_rows(GroupFilter(outcome="ungraded")))) == 0
    assert len(groups) == 3 * 8
    assert len(grades) == 4 * sum(group.prompt.domain == "code" for group in groups)
    worth = {"wrong": 0.0, "malformed": -1.0}
    assert {grade.outcome for grade in grades} == set(worth)
    assert all(grade.reward == worth[grade.outcome] for grade in grades)
    assert {g.reason for g in grades if g.outcome == "wrong"} <= {
        "no fenced code block after the thinking part",
        "no fenced code block after the thinking part: the token limit was reached",
    }
    metrics = [json.loads(line) for line in (tmp_path / "code" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3


def test_unusable_tests_and_sandboxes_are_refused_before_training(start: Start, rl_overrides, mixed: Path) -> None:
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    rows[1]["reference"] = {"kind": "stdin", "tests": []}
    bad = mixed.with_name("bad.jsonl")
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = start("train_rl", CONFIG, [*rl_overrides("refused"), *CODE, f"data.prompts=[{bad}]"], ranks=1)
    assert launch.wait() == [2], launch.output()
    assert f"{rows[1]['id']}: the tests cannot be used: tests: List should have at least 1 item" in launch.output()
    broken = [*rl_overrides("broken"), *CODE, f"data.prompts=[{mixed}]", "code_reward.python=/nonexistent"]
    launch = start("train_rl", CONFIG, broken, ranks=1)
    assert launch.wait() == [2], launch.output()
    assert "code_reward.python: /nonexistent" in launch.output()
