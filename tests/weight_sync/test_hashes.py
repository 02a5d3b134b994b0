"""Checksums against their definitions written out, and against SGLang's own kernel in Triton's interpreter."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_klear.config.serving import SglangSettings
from megatron_klear.weight_sync.hashes import cpu_hash, engine_hash, gpu_hash

ROOT = Path(__file__).parents[2]
M = 0xFFFFFFFF


def tensors() -> list[torch.Tensor]:
    """Sizes around words, tiles of 8192 words and groups of tiles; both data types."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for numel, dtype in ((1, torch.bfloat16), (3, torch.bfloat16), (8192, torch.float32), (8193, torch.float32),
                         (2 * 8192 * 3 + 5, torch.bfloat16)):  # fmt: skip
        made.append(torch.randn(numel, generator=generator).to(dtype))
    return made


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & M
    x ^= x >> 13
    x = x * 0xC2B2AE35 & M
    return x ^ (x >> 16)


def rotated(x: int, by: int) -> int:
    return (x << by | x >> (32 - by)) & M


def by_hand(tensor: torch.Tensor) -> int:
    """The GPU hash, word by word in Python's integers."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    seeds = (0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & M)
    total = 0
    for start in range(0, len(words), 8192):
        sums = [0, 0]
        for i, word in enumerate(words[start : start + 8192], start):
            for j, (factor, turn) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                sums[j] += mix(word ^ (i * factor + seeds[j] & M) ^ rotated(i, turn))
        first, second = (mix((s & M) ^ 4 * len(words)) for s in sums)
        total += first << 32 | second
    x = total & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor & (2**64 - 1)
    return x ^ x >> 31


@pytest.mark.parametrize("tensor", tensors(), ids=lambda t: f"{t.numel()}-{t.dtype}")
def test_gpu_hash_is_the_one_written_out(tensor: torch.Tensor) -> None:
    assert gpu_hash(tensor) == by_hand(tensor)


def test_gpu_hash_does_not_depend_on_how_many_tiles_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(8192 * 5 + 7, dtype=torch.float32)
    whole = gpu_hash(tensor)
    monkeypatch.setattr("megatron_klear.weight_sync.hashes._TILES_AT_A_TIME", 2)
    assert gpu_hash(tensor) == whole


def test_cpu_hash_is_the_beginning_of_sha256() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert engine_hash(tensor, "cpu") == digest[:16]
    assert cpu_hash(tensor.t()) != cpu_hash(tensor)  # the order of elements counts, not that of memory
    assert cpu_hash(tensor.t().contiguous()) == cpu_hash(tensor.t())


def test_nothing_has_a_hash_too() -> None:
    assert engine_hash(torch.empty(0), "cuda") == "0" * 16


KERNEL = """
import importlib.util, json, sys
import torch, triton
path = importlib.util.find_spec("sglang").submodule_search_locations[0] + "/kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("theirs", path)
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
hashes = []
for tensor in torch.load(sys.argv[1]):
    data = tensor.view(torch.uint8)
    words = torch.cat([data, data.new_zeros(-len(data) % 4)]).view(torch.uint32)
    seed, tiles = 0x243F6A88, triton.cdiv(len(words), 8192)
    sums = torch.empty(tiles, dtype=torch.uint64)
    theirs.hash_tiles32_kernel_blocked[(tiles,)](
        words, sums, len(words), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=theirs.FMIX32_C1, FM_C2=theirs.FMIX32_C2, POS_A=theirs.POS_C1, POS_B=theirs.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=True,
    )
    while len(sums) > 1:
        more = torch.empty(triton.cdiv(len(sums), 1024), dtype=torch.uint64)
        theirs.add_tree_reduce_u64_kernel[(len(more),)](sums, more, len(sums), CHUNK=1024)
        sums = more
    hashes.append(theirs._final_splitmix64(int(sums.item())))
print(json.dumps(hashes))
"""


def test_gpu_hash_is_that_of_sglangs_kernel(tmp_path: Path, sglang_settings: SglangSettings) -> None:
    torch.save(tensors(), tmp_path / "tensors.pt")
    done = subprocess.run(
        [f"{sglang_settings.venv}/bin/python", "-W", "ignore", "-c", KERNEL, str(tmp_path / "tensors.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ""}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [gpu_hash(tensor) for tensor in tensors()]


def test_hashed_memory_can_still_be_given_back() -> None:
    """The weights of a trainer that shares its device leave it after a publish; torch pins what NumPy has seen."""
    tensor = torch.ones(5)
    cpu_hash(tensor)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0
