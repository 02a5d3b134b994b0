"""Peak memory of conversions, of a model many times larger than what may be held."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_klear.config import Architecture
from megatron_klear.model import hf_config
from megatron_klear.model.hf_names import tensor_rules

REPOSITORY = Path(__file__).parents[2]
ARCH = Architecture(
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=128,
    vocab_size=49_900,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    init_std=0.02,
)
LARGEST = 50_048 * 1024 * 2
"""Bytes of the largest Megatron tensor, the padded embedding."""

# As tools/convert sets it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}

# The first conversion brings in all code; what the second adds to the memory is what conversion takes.
MEASURED = """
import json, sys
from pathlib import Path
from megatron_klear.checkpoint.convert_from_hf import hf_to_megatron
from megatron_klear.checkpoint.convert_to_hf import megatron_to_hf
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
small, large, work = (Path(name) for name in sys.argv[1:])
peaks = {}
for name, convert in (
    ("hf_to_megatron", lambda hf, to: hf_to_megatron(hf, to / "run")),
    ("megatron_to_hf", lambda hf, to: megatron_to_hf(to / "run", to / "back", shard_gb=0.1)),
):
    convert(small, work / "small")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    convert(large, work / "large")
    peaks[name] = status("VmHWM") - before
print(json.dumps(peaks))
"""


def write_model(directory: Path, arch: Architecture) -> int:
    """Random bits, one file per layer; returns the bytes of all tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(arch, dtype="bfloat16")))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for rule in tensor_rules(arch):
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            tensor = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)
            files.setdefault(f"model-{rule.layer}.safetensors", {})[name] = tensor
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_less_than_the_largest_tensor(tmp_path: Path) -> None:
    small = dataclasses.replace(ARCH, num_layers=1, hidden_size=64, ffn_hidden_size=64, vocab_size=128)
    write_model(tmp_path / "hf-small", small)
    total = write_model(tmp_path / "hf-large", ARCH)
    assert total > 450e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "hf-small"), str(tmp_path / "hf-large"), str(tmp_path)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    )
    peaks = json.loads(done.stdout)
    print({name: f"{peak / 1e6:.0f} MB of {total / 1e6:.0f} MB" for name, peak in peaks.items()})
    for name, peak in peaks.items():
        assert 1e6 < peak < LARGEST, name
