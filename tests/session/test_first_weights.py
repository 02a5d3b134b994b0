"""Whether responses of version 0 are of the weights that a life of the run begins with."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_klear.checkpoint import layout
from megatron_klear.checkpoint.conversion import HF_FILES
from megatron_klear.config import CheckpointSettings, ModelSettings, RunSettings, Settings, TokenizerSettings
from megatron_klear.session.first_weights import first_weights_identity


def identity(hf_files: Path | None, *, resumed: Any = None, **changed: Any) -> str:
    sections: dict[str, Any] = {
        "run": RunSettings(dir="run"),
        "tokenizer": TokenizerSettings(dir="tokenizer"),
        "model": ModelSettings(preset="qwen3-tiny"),
    }
    session: Any = SimpleNamespace(
        settings=Settings(**{**sections, **changed}), resumed=resumed, store=SimpleNamespace(hf_files=hf_files)
    )
    return first_weights_identity(session, "data")


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    assert identity(None) == identity(tmp_path)
    assert identity(None, run=RunSettings(dir="run", seed=5)) != identity(None)


def test_another_checkpoint_of_the_run_that_is_started_from(tmp_path: Path) -> None:
    start = CheckpointSettings(start_from=str(tmp_path))

    def saved(step: int, content: bytes) -> Path:
        directory = layout.step_directory(tmp_path / "checkpoints", step)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights").write_bytes(content)
        layout.write_manifest(directory, layout.checksums(directory, ["weights"]))
        return directory / HF_FILES

    begun = [(2, b"a"), (2, b"a"), (4, b"a"), (2, b"b")]
    found = [identity(saved(step, content), checkpoint=start) for step, content in begun]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    (layout.step_directory(tmp_path / "checkpoints", 2) / layout.MANIFEST).unlink()
    assert identity(tmp_path / "checkpoints" / "step_00000002" / HF_FILES, checkpoint=start) not in found
    assert identity(saved(4, b"a"), resumed={}, checkpoint=start) == identity(None, resumed={}, checkpoint=start)


@pytest.mark.parametrize("names", [["model.safetensors"], ["model-1.safetensors", "model-2.safetensors"]])
def test_other_files_in_the_directory_of_the_model(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    model = ModelSettings(preset="qwen3-tiny", hf_dir=str(tmp_path))
    first = identity(tmp_path, model=model)
    (tmp_path / "README.md").touch()
    assert identity(tmp_path, model=model) == first
    os.utime(tmp_path / names[-1], ns=(5, 5))
    assert identity(tmp_path, model=model) == first, "as where each job copies the weights to its node"
    (tmp_path / names[-1]).write_bytes(b"weighty")
    other = identity(tmp_path, model=model)
    large = bytearray(3_000_000)
    (tmp_path / names[-1]).write_bytes(large)
    zeros = identity(tmp_path, model=model)
    large[1_500_000:1_600_000] = b"x" * 100_000
    (tmp_path / names[-1]).write_bytes(large)
    assert len({first, other, zeros, identity(tmp_path, model=model)}) == 4
