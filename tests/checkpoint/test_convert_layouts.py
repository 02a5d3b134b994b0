"""Converted checkpoints in real models: any layout loads them, and exports from any layout are exact.

Two gloo processes build Megatron's model in every layout that two processes allow; one launch does all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_klear.checkpoint.convert_from_hf import hf_to_megatron
from megatron_klear.checkpoint.convert_to_hf import megatron_to_hf
from megatron_klear.checkpoint.torch_dist_stream import TorchDistReader

WORKER = Path(__file__).with_name("convert_worker.py")
WORLD_SIZE = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "tp2sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
}
MODELS = ("untied", "tied")
SAVED = ("tp2", "pp2", "dp2")
SOURCES = ("converted", *SAVED)
LOADS = [
    *((model, "converted", target) for model in MODELS for target in LAYOUTS),
    *(("untied", source, target) for source, target in (("tp2", "pp2"), ("pp2", "tp2"))),
]


@pytest.fixture(scope="module")
def directory(make_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face models and their conversions: untied, tied, and untied in bfloat16."""
    directory = tmp_path_factory.mktemp("layouts")
    for name in MODELS:
        make_hf(directory / f"hf-{name}", tie_word_embeddings=name == "tied", seed=len(name))
        hf_to_megatron(directory / f"hf-{name}", directory / f"{name}-converted")
    make_hf(directory / "hf-bf16", dtype=torch.bfloat16, seed=9)
    make_hf(directory / "hf-other", num_hidden_layers=6, intermediate_size=128)
    return directory


def jobs(directory: Path) -> list[dict[str, Any]]:
    """Everything that the two processes do, in order."""
    hf = {name: str(directory / f"hf-{name}") for name in (*MODELS, "bf16", "other")}
    found: list[dict[str, Any]] = []
    for model in MODELS:
        converted = str(directory / f"{model}-converted" / "checkpoints" / "step_00000000")
        shared = {"hf": hf[model], "checkpoint": converted}
        found.append({"name": f"keys {model}", "action": "keys", "layout": {}, **shared})
        found.append({"name": f"logits {model}", "action": "logits", "layout": {}, **shared})
        for layout in SAVED:
            out = str(directory / f"{model}-{layout}")
            found.append(
                {"name": f"save {out}", "action": "save", "layout": LAYOUTS[layout], "out": out, "hf": hf[model]}
            )
    for layout in SAVED:
        at = LAYOUTS[layout]
        out = str(directory / f"trained-{layout}")
        found.append(
            {
                "name": f"train {layout}",
                "action": "train",
                "layout": at,
                "out": out,
                "hf": hf["bf16"],
                "dtype": "bfloat16",
            }
        )
        converted = str(directory / "tied-converted" / "checkpoints" / "step_00000000")
        found.append(
            {"name": f"resume {layout}", "action": "resume", "layout": at, "checkpoint": converted, "hf": hf["tied"]}
        )
    out = str(directory / "bf16-tp2")
    found.append(
        {
            "name": "save bf16",
            "action": "save",
            "layout": LAYOUTS["tp2"],
            "out": out,
            "hf": hf["bf16"],
            "dtype": "bfloat16",
        }
    )
    untied = str(directory / "untied-converted" / "checkpoints" / "step_00000000")
    found.append(
        {
            "name": "narrow",
            "action": "load",
            "layout": {},
            "hf": hf["untied"],
            "checkpoint": untied,
            "dtype": "bfloat16",
        }
    )
    found.append({"name": "other", "action": "refuse", "layout": {}, "hf": hf["other"], "checkpoint": untied})
    for model, source, target in LOADS:
        step = "step_00000000" if source == "converted" else "step_00000005"
        checkpoint = str(directory / f"{model}-{source}" / "checkpoints" / step)
        shared = {"hf": hf[model], "checkpoint": checkpoint, "layout": LAYOUTS[target]}
        found.append({"name": f"load {model} {source} {target}", "action": "load", **shared})
    return found


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    """What each of the two processes found, by name of the job."""
    (directory / "jobs.json").write_text(json.dumps(jobs(directory)))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    processes, logs = [], [directory / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    for rank, log in enumerate(logs):
        command = [sys.executable, str(WORKER), str(rank), str(WORLD_SIZE), str(directory)]
        with log.open("w") as stream:
            processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 240
    try:
        while any(process.poll() is None for process in processes):
            # A rank that failed leaves the other waiting in an exchange.
            assert not any(process.poll() for process in processes), "\n".join(log.read_text() for log in logs)
            assert time.monotonic() < deadline, "\n".join(["timed out", *(log.read_text() for log in logs)])
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(log.read_text() for log in logs)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_those_of_transformers(ranks: list[dict[str, Any]], model: str) -> None:
    for found in ranks:
        result = found[f"logits {model}"]
        assert result["scale"] > 1  # random, but not so small that everything would be equal
        assert result["logits"] < 1e-5
        assert result["logprobs"] < 1e-5


@pytest.mark.parametrize(("model", "source", "target"), LOADS)
def test_every_layout_loads_every_checkpoint(ranks: list[dict[str, Any]], model: str, source: str, target: str) -> None:
    for found in ranks:
        result = found[f"load {model} {source} {target}"]
        assert len(result["names"]) > 10
        assert result["ours"] == []
        assert result["theirs"] == []


def test_a_model_takes_its_own_number_format(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["narrow"]["ours"] == found["narrow"]["theirs"] == []


def test_another_model_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        text = found["other"]["error"]
        assert "wrong shape: decoder.layers.mlp.linear_fc1.weight is [4, 192, 64], must be [6, 256, 64]" in text
        assert "wrong shape: decoder.layers.self_attention.q_layernorm.weight is [4, 24], must be [6, 24]" in text


@pytest.mark.parametrize("model", MODELS)
def test_keys_and_shapes_are_those_that_megatron_stores(
    directory: Path, ranks: list[dict[str, Any]], model: str
) -> None:
    reader = TorchDistReader(directory / f"{model}-converted" / "checkpoints" / "step_00000000")
    expected = ranks[0][f"keys {model}"]
    tensors = {key: tuple(shape) for key, shape in expected.items() if shape is not None}
    assert reader.shapes == tensors
    assert {key for key in expected if key not in tensors} <= reader.object_keys


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("layout", SAVED)
@pytest.mark.parametrize("model", MODELS)
def test_export_of_a_checkpoint_that_megatron_wrote_is_exact(
    directory: Path, tmp_path: Path, model: str, layout: str
) -> None:
    export_and_compare(directory / f"{model}-{layout}", directory / f"hf-{model}", tmp_path / "out")


@pytest.mark.usefixtures("ranks")
def test_export_of_bfloat16_is_exact(directory: Path, tmp_path: Path) -> None:
    export_and_compare(directory / "bf16-tp2", directory / "hf-bf16", tmp_path / "out")


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("layout", SAVED)
def test_export_of_a_checkpoint_with_optimizer_state_is_exact(directory: Path, tmp_path: Path, layout: str) -> None:
    export_and_compare(directory / f"trained-{layout}", directory / "hf-bf16", tmp_path / "out")


@pytest.mark.parametrize("layout", SAVED)
def test_training_starts_from_a_converted_checkpoint(ranks: list[dict[str, Any]], layout: str) -> None:
    for found in ranks:
        assert found[f"resume {layout}"] == {"state": None, "different": []}  # weights, and no step has been made


def export_and_compare(run: Path, hf: Path, out: Path) -> None:
    megatron_to_hf(run, out, tokenizer=hf)
    theirs = {name: t for file in hf.glob("*.safetensors") for name, t in load_file(file).items()}
    ours = load_file(out / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
