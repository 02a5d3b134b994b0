"""Weights, gradients and optimizer state of real Megatron models, tensor by tensor, against the planner: equal."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config import (
    Architecture,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.planning.memory import trainer_state

WORKER = Path(__file__).with_name("state_worker.py")
REPOSITORY = Path(__file__).parents[2]
RANKS = 4

# No size is a multiple of 64 or 128, so that every padding shows.
ARCH = Architecture(
    num_layers=4,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=29,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    init_std=0.02,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4 plain": {"distributed_optimizer": False},
    "dp4 float32": {"dtype": "float32"},
    "dp4 float32 plain": {"dtype": "float32", "distributed_optimizer": False},
    "tp2 dp2 sp": {"tp": 2, "sequence_parallel": True},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "cp2 dp2": {"cp": 2},
    "cp4": {"cp": 4, "overlap_grad_reduce": True},
    "pp4": {"pp": 4},
    "pp2 dp2 tied": {"pp": 2, "tie_embeddings": True},
    "pp2 dp2 tied plain": {"pp": 2, "tie_embeddings": True, "distributed_optimizer": False},
    "tp2 pp2 tied sp": {"tp": 2, "pp": 2, "tie_embeddings": True, "sequence_parallel": True, "dtype": "float32"},
    "dp4 tied": {"tie_embeddings": True, "vocab_multiple": 6},
    "pp2 cp2 padded": {"pp": 2, "cp": 2, "vocab_multiple": 50},
    # More than the 40 million numbers after which Megatron closes a bucket, on the first stage only.
    "pp2 dp2 buckets": {
        "pp": 2,
        "overlap_grad_reduce": True,
        "vocab_size": 600_001,
        "num_layers": 2,
        "hidden_size": 80,
    },
}
"""Every setting differs from the settings above it in what it is named for."""


def settings_of(choice: dict[str, Any]) -> Settings:
    layout = {name: value for name, value in choice.items() if name in ParallelSettings.__dataclass_fields__}
    rest = {name: value for name, value in choice.items() if name not in layout}
    model = {**dataclasses.asdict(ARCH), "dtype": "bfloat16", "layer_spec": "local", "vocab_multiple": 4, **rest}
    return Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(**model),
        parallel=ParallelSettings(**layout),
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """What every rank measured, by layout; one launch for all."""
    directory = tmp_path_factory.mktemp("state")
    jobs = {}
    for name, choice in LAYOUTS.items():
        settings = settings_of(choice)
        layout = {f: getattr(settings.parallel, f) for f in choice if f in ParallelSettings.__dataclass_fields__}
        model = {k: v for k, v in dataclasses.asdict(settings.model).items() if v is not None}
        jobs[name] = {"parallel": layout, "model": model}
    (directory / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "PYTHONWARNINGS": "ignore"}
    ranks = []
    for rank in range(RANKS):
        log = (directory / f"log{rank}").open("w")
        command = [sys.executable, str(WORKER), str(rank), port, str(directory)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        statuses = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = [(directory / f"log{rank}").read_text()[-2000:] for rank in range(RANKS)]
    assert statuses == [0] * RANKS, "\n".join(logs)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_that_stays_is_predicted(name: str, measured: list[dict[str, dict[str, int]]]) -> None:
    settings = settings_of(LAYOUTS[name])
    found, expected = [], []
    for rank in measured:
        one = rank[name]
        state = trainer_state(settings, stage=one["stage"], dp=one["dp"], shard=one["shard"])
        found.append({part: one[part] for part in ("weights", "gradients", "optimizer")})
        expected.append(dataclasses.asdict(state))
    assert found == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_worst_rank_is_the_one_that_is_told(name: str, measured: list[dict[str, dict[str, int]]]) -> None:
    settings = settings_of(LAYOUTS[name])
    for stage in range(settings.parallel.pp):
        ranks = [rank[name] for rank in measured if rank[name]["stage"] == stage]
        worst = trainer_state(settings, stage=stage, dp=ranks[0]["dp"])
        assert worst.optimizer == max(rank["optimizer"] for rank in ranks)


def test_layouts_cover_what_moves_bytes(measured: list[dict[str, dict[str, int]]]) -> None:
    """Padding, sharding and copies are not all the same: else equality would say little."""
    first = measured[0]
    assert first["dp4"]["gradients"] > first["dp4 plain"]["gradients"]
    assert first["dp4"]["optimizer"] < first["dp4 plain"]["optimizer"] / 3
    assert len({tuple(sorted(values.items())) for values in first.values()}) > 11
    assert len({rank["dp4"]["optimizer"] for rank in measured}) > 1  # padding is the last rank's
