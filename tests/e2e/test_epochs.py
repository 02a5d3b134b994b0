"""A run of epochs trains every row as often as it has epochs, also when more are asked for on the way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

CONFIG = "examples/quickstart_sft.yaml"


def sizes_and_rows(run: Path) -> tuple[list[int], Counter[tuple[str, str]]]:
    """Sequences of each step, and how often each (epoch, id) was trained."""
    lines = [json.loads(line)["ids"] for line in (run / "sequences.jsonl").read_text().splitlines()]
    sizes = [sum(len(ids) for ids in line.values()) for line in lines]
    return sizes, Counter((epoch, name) for line in lines for epoch, ids in line.items() for name in ids)


def test_the_last_step_has_what_is_left_of_the_epochs(start, sft_overrides, data, tmp_path):
    rows = {json.loads(line)["id"] for line in (data / "sft.jsonl").read_text().splitlines()}
    assert len(rows) == 96
    overrides = [*sft_overrides("run"), "sft.steps=null", "sft.batch_sequences=36", "evaluation.at_end=false"]
    first = start("train_sft", CONFIG, [*overrides, "sft.epochs=1"])
    assert first.wait() == [0, 0], first.output()
    assert "steps of 36 sequences, the last one of 24" in first.output()
    sizes, trained = sizes_and_rows(tmp_path / "run")
    assert sizes == [36, 36, 24]
    assert trained == Counter({("0", name): 1 for name in rows})

    # From its start, a run of two epochs has 192 / 36, that is 5 steps; 96 rows in steps of 36 are left for 3.
    second = start("train_sft", CONFIG, [*overrides, "sft.epochs=2"], ranks=1)
    assert second.wait() == [0], second.output()
    assert "settings were changed on the way: the run ends at step 6 and not at 5" in second.output()
    sizes, trained = sizes_and_rows(tmp_path / "run")
    assert sizes == [36, 36, 24, 36, 36, 24]
    assert trained == Counter({(epoch, name): 1 for epoch in "01" for name in rows})
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]


def test_rows_that_cannot_be_used_are_counted_and_the_others_trained(start, sft_overrides, data, tmp_path):
    lines = (data / "sft.jsonl").read_text().splitlines()[:12]
    rows = {json.loads(line)["id"] for line in lines}
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:5], lines[5][:-5], '{"id": "x", "messages": []}', *lines[6:]]) + "\n")
    launch = start(
        "train_sft", CONFIG,
        [*sft_overrides("run"), f"data.sft=[{broken}]", "sft.steps=null", "sft.epochs=1", "sft.batch_sequences=4",
         "evaluation.at_end=false"],
    )  # fmt: skip
    assert launch.wait() == [0, 0], launch.output()
    text = launch.output()
    assert "2 of 13 rows cannot be used (15.4%):" in text
    assert f"  - {broken}:6: is not JSON" in text
    assert f"  - {broken}:7: " in text
    assert "11 conversations, " in text
    assert "2 rows rejected, see " in text
    _, trained = sizes_and_rows(tmp_path / "run")
    assert trained == Counter({("0", name): 1 for name in rows - {json.loads(lines[5])["id"]}})
    rejects = [json.loads(line) for line in next(tmp_path.rglob("rejects.jsonl")).read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rejects] == [(str(broken), 6), (str(broken), 7)]
    assert all(row["reason"] for row in rejects)
