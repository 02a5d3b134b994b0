"""SFT on real chains of thought, at 1,024 and 32,768 tokens: the same losses and the same sequences in any layout."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_klear.data import SftIndex

ROOT = Path(__file__).parents[2]
CONFIG = "examples/champ_sft.yaml"
TP2_CP2 = ["parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true"]
BUDGETS = {
    1024: [
        "packing.token_budget=1024",
        "packing.oversize=drop",
        "sft.normalizer=token",
        "sft.batch_bins=8",
        "sft.epochs=2",
    ],
    # One layer: what attention of 32K costs on a CPU is most of the test's time.
    32768: ["packing.token_budget=32768", "sft.batch_bins=1", "sft.epochs=1", "model.num_layers=1"],
}


@pytest.fixture(scope="module")
def champ(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of 22 problems, and one of 32,000 tokens."""
    out = tmp_path_factory.mktemp("champ")
    command = [sys.executable, "examples/champ_data.py", "--out", str(out), "--problems", "22"]
    subprocess.run([*command, "--long-rows", "1", "--long-tokens", "32500"], cwd=ROOT, check=True, capture_output=True)
    return out


def overrides(champ: Path, run: Path, budget: int) -> list[str]:
    return [
        f"run.dir={run}",
        f"tokenizer.dir={champ / 'tokenizer'}",
        f"data.sft=[{champ / 'sft'}]",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.head_dim=8",
        "optimizer.adam_eps=1.0e-3",  # gradients that are only rounding errors shall not move weights
        "observe.tensorboard=false",
        "observe.report=false",
        "checkpoint.every_steps=2",
        *BUDGETS[budget],
    ]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained_ids(run: Path) -> list[tuple[str, str]]:
    """(epoch, id) of every sequence that was trained, in order, from the run's own log."""
    lines = [json.loads(line) for line in (run / "sequences.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(epoch, name) for line in lines for epoch, ids in line["ids"].items() for name in ids]


def opened_index(champ: Path) -> SftIndex:
    (directory,) = (champ / "sft" / "klear_index").iterdir()
    return SftIndex(directory)


def require_each_once_per_epoch(run: Path, champ: Path, epochs: int) -> None:
    index = opened_index(champ)
    budget = 1024 if epochs == 2 else 32768
    every = {index.row_id(n) for n in range(len(index)) if -(-index.lengths[n] // 32) * 32 <= budget}
    assert len(every) > 60
    counts = Counter(trained_ids(run))
    assert counts == dict.fromkeys(((str(epoch), name) for epoch in range(epochs) for name in every), 1)


def wait_for_steps(launch, run: Path, wanted: int) -> None:
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_bytes().splitlines()) < wanted:
        assert time.monotonic() < deadline, launch.output()
        assert all(p.poll() is None for p in launch.processes), launch.output()
        time.sleep(0.005)


def require_equal(run: Path, other: Path) -> None:
    one, two = metrics(run), metrics(other)
    assert len(one) == len(two) >= 3
    losses = [np.array([line["loss/total"] for line in lines]) for lines in (one, two)]
    # float32, whose unit is 6e-8, summed in another order; over the steps the weights drift apart by as little.
    np.testing.assert_allclose(losses[0], losses[1], rtol=3e-7)
    np.testing.assert_allclose(
        [line["optimizer/grad_norm"] for line in one], [line["optimizer/grad_norm"] for line in two], rtol=5e-6
    )
    assert all(line["phase_seconds/wait_for_data"] >= 0 for line in one)


def test_1024_tokens_killed_in_tp2_cp2_and_resumed_in_dp2_equals_one_process(start, champ, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = start("train_sft", CONFIG, overrides(champ, whole, 1024), ranks=1)
    assert first.wait() == [0], first.output()
    launch = start("train_sft", CONFIG, [*overrides(champ, killed, 1024), *TP2_CP2], ranks=4)
    wait_for_steps(launch, killed, 3 + random.Random(1).randint(0, 2))
    launch.signal(signal.SIGKILL)
    launch.wait()
    assert len(metrics(killed)) < len(metrics(whole))
    dali = ["data.loader=dali", "data.loader_processes=1"]  # which reads the same bytes
    resumed = start("train_sft", CONFIG, [*overrides(champ, killed, 1024), *dali], ranks=2)
    assert resumed.wait() == [0, 0], resumed.output()
    require_equal(whole, killed)
    assert metrics(whole)[-1]["loss/total"] < metrics(whole)[0]["loss/total"] - 0.2
    assert trained_ids(killed) == trained_ids(whole)
    require_each_once_per_epoch(killed, champ, epochs=2)
    dropped = [json.loads(line) for line in (killed / "dropped.jsonl").read_text().splitlines()]
    assert "P_Combinatorics_1/long" in {row["id"] for row in dropped}


def test_32768_tokens_in_tp2_cp2_equals_one_process(start, champ, tmp_path):
    """One bin is nearly all one sequence, so that positions and the zig-zag of 32K go through the entry."""
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    first = start("train_sft", CONFIG, overrides(champ, single, 32768), ranks=1)
    assert first.wait() == [0], first.output()
    told = [line.partition("source ")[2] for line in first.output().splitlines() if "source " in line]
    assert told[0].startswith("long: 3"), "tokens by source, the largest first"
    assert len(told) > 1
    second = start("train_sft", CONFIG, [*overrides(champ, sharded, 32768), *TP2_CP2], ranks=4)
    assert second.wait() == [0] * 4, second.output()
    require_equal(single, sharded)
    for run in (single, sharded):
        require_each_once_per_epoch(run, champ, epochs=1)
    assert opened_index(champ).lengths.max() > 30_000
    assert metrics(single)[0]["packing/slots_used"] > 0.98
