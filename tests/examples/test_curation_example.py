"""The curation example runs as it is shipped, on fewer rows, and its result is what the trainer reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear import curate
from megatron_klear.data.rows import parse_sft_row, read_prompt_rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "curation"


def test_the_shipped_settings_make_what_the_trainer_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, str(EXAMPLE / "make_rows.py"), "--count", "60"], check=True)
    assert curate.run([str(EXAMPLE / "sft.yaml"), "selection.math=100"]) == 0
    assert curate.run([str(EXAMPLE / "rl.yaml")]) == 0
    audit = {s["name"]: s for s in json.loads(Path("runs/curation/sft/audit.json").read_text())["stages"]}
    assert audit["dedup"]["dropped"]["duplicate"] > 0
    # The ten problems of each task that are in the benchmark, less those that were repeated or damaged.
    assert 20 <= audit["decontaminate"]["dropped"]["contaminated"] <= 45
    assert audit["select"]["rows_out"] == 100
    assert set(audit["difficulty"]["tables"]["rows by difficulty"]) == {"easy", "hard"}
    rows = [json.loads(line) for line in Path("runs/curation/sft/result/000000-000.jsonl").read_text().splitlines()]
    assert not [fault for row in rows for fault in [parse_sft_row("", row)] if isinstance(fault, list)]
    assert {row["outcome"] for row in rows if row["difficulty"] == "easy"} == {"correct"}
    prompts = read_prompt_rows([str(path) for path in Path("runs/curation/rl/result").iterdir()])
    assert 0 < len(prompts) < 200
