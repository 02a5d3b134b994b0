"""An evaluation during training that is killed in its middle is made again, and every step's is logged once."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served_runs import CONFIG

WORKER = str(Path(__file__).with_name("dying_evaluation_worker.py"))
STEPS, PROBLEMS = 4, 8


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Figures of the evaluations in order, without the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows if row["phase"] == "eval"]


def require_written(directory: Path, logged: dict[str, Any]) -> None:
    """The files of an evaluation are all there, and of the answers that the figures in the log are of."""
    value = json.loads((directory / "results.json").read_text())
    (result,) = value["benchmarks"]
    assert value["facts"]["model"].startswith(f"step {logged['step']} of ")
    assert (result["name"], result["label"], result["num_problems"]) == ("heldout", "avg@2", PROBLEMS)
    assert result["num_responses"] - result["outcomes"]["ungraded"] == logged["accuracy/heldout_count"]
    assert result["avg"]["mean"] == pytest.approx(logged["accuracy/heldout"], abs=1e-12)
    assert result["avg"]["low"] <= result["avg"]["mean"] <= result["avg"]["high"]
    assert list(result["pass_at_k"]) == ["1", "2"]
    assert result["pass_at_k"]["2"]["mean"] >= result["avg"]["mean"]
    grades = [json.loads(line) for line in (directory / "grades.jsonl").read_text().splitlines()]
    made = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    assert len(made) == len(grades) == 2 * PROBLEMS
    page = (directory / "evaluation.html").read_text()
    assert page.count('<details class="card problem">') == PROBLEMS


@pytest.mark.parametrize(("engine", "die_at"), [("local", 2), ("local", STEPS), ("sglang", 2), ("sglang", STEPS)])
def test_it_is_made_again_and_logged_once(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    stand_ins: Callable[..., list[str]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    die_at: int,
) -> None:
    heldout = tmp_path / "problems.jsonl"
    heldout.write_bytes((data / "heldout.jsonl").read_bytes())
    shared = [
        f"rl.steps={STEPS}", "checkpoint.every_steps=1", "evaluation.every_steps=2", "reward.require_think=false",
        f"data.heldout=[{heldout}]", "evaluation.samples_per_prompt=2", "evaluation.temperature=1.0",
        *(stand_ins() if engine == "sglang" else ()),
    ]  # fmt: skip

    def launch(name: str, die_at: int) -> Any:
        monkeypatch.setenv("KLEAR_DIE_AT", str(die_at))
        return start(WORKER, CONFIG, [*rl_overrides(name), *shared], ranks=1)

    killed = launch("killed", die_at)
    assert killed.wait() == [-signal.SIGKILL], killed.output()
    run = tmp_path / "killed"
    assert [row["step"] for row in evaluations(run)] == list(range(0, die_at, 2))
    assert not (run / "result.json").exists()

    # A file of problems that has vanished meanwhile is named, and nothing is lost by it.
    heldout.rename(tmp_path / "elsewhere")
    refused = launch("killed", die_at)
    assert refused.wait() == [2], refused.output()
    assert f"data.heldout: no file {heldout}" in refused.output()
    (tmp_path / "elsewhere").rename(heldout)

    resumed = launch("killed", die_at)
    assert resumed.wait() == [0], resumed.output()
    found = evaluations(run)
    assert [row["step"] for row in found] == [0, 2, STEPS]
    for row in found:
        require_written(run / "evaluations" / f"step-{row['step']}", row)
    result = json.loads((run / "result.json").read_text())
    assert (result["step"], result["count"]) == (STEPS, found[-1]["accuracy/heldout_count"])
    assert result["accuracy"] == found[-1]["accuracy/heldout"]
    if engine == "sglang":
        return  # stand-ins for servers answer by chance
    whole = launch("whole", STEPS + 1)
    assert whole.wait() == [0], whole.output()
    assert evaluations(tmp_path / "whole") == found
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
