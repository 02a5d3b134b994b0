"""Peak memory of converting an 8B-shaped checkpoint to Megatron's format and back, and whether every bit survived.

    python benchmarks/convert_memory.py --directory DIR [--preset qwen3-8b]

Makes a Hugging Face directory of random bits (bfloat16, tensor by tensor, in files of 5 GB) below DIR, runs
`tools/convert hf-to-megatron` and `tools/convert megatron-to-hf` on it as a user would, and compares all tensors of
both Hugging Face directories byte for byte. DIR needs room for three copies of the model (49 GB for the 8B); what was
made is removed at the end.

Memory is the converter's own: its anonymous memory and mapped files that are resident, not the system's cache of the
files that it reads and writes. Two figures are taken five times a second:
  VmHWM   the kernel's own record of the process's largest resident set, so nothing between two looks is missed
  PSS     resident memory of the process and its children, shared pages counted in proportion
Prints a table, and writes it as JSON to benchmarks/results/convert_memory.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_klear.checkpoint.hf_directory import stored_tensors
from megatron_klear.checkpoint.safetensors_stream import TensorEntry, write_shards
from megatron_klear.config import PRESETS, Architecture
from megatron_klear.model import hf_config
from megatron_klear.model.hf_names import tensor_rules

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "convert_memory.json"
LIMIT_BYTES = 6e9
BLOCK_BYTES = 64 << 20
INTERVAL_SECONDS = 0.2


def entries_of(arch: Architecture) -> list[TensorEntry]:
    """Every Hugging Face tensor, in forward order."""
    return [
        TensorEntry(name=name, dtype=torch.bfloat16, shape=shape)
        for rule in tensor_rules(arch)
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]


def random_blocks(entry: TensorEntry, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    """Random bits in blocks of rows; among them are infinities and NaNs of every kind."""
    row = entry.num_bytes // entry.shape[0]
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, entry.shape[0], step):
        rows = min(step, entry.shape[0] - start)
        bits = np.frombuffer(generator.bytes(rows * row), dtype=np.int16).copy()
        yield torch.from_numpy(bits).view(torch.bfloat16).view(rows, *entry.shape[1:])


def make_model(directory: Path, arch: Architecture, seed: int) -> int:
    """Write the directory; returns the bytes of its tensors."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(arch, dtype="bfloat16")))
    generator = np.random.default_rng(seed)
    entries = entries_of(arch)
    write_shards(
        directory, entries, 5e9, (random_blocks(entry, generator) for entry in entries), written=lambda entry: None
    )
    return sum(entry.num_bytes for entry in entries)


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; its peak memory in bytes and its time.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = {"vmhwm_bytes": 0.0, "pss_bytes": 0.0}
    while process.poll() is None:
        with contextlib.suppress(OSError, psutil.Error):  # the process may end between two looks
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
            peaks["vmhwm_bytes"] = max([peaks["vmhwm_bytes"], *found])
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peaks["pss_bytes"] = max(peaks["pss_bytes"], sum(member.memory_full_info().pss for member in family))
        time.sleep(INTERVAL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {**peaks, "seconds": time.perf_counter() - start}


def differences(first: Path, second: Path, arch: Architecture) -> tuple[int, list[str]]:
    """Bytes compared, and the names of tensors that differ in any bit."""
    ours, theirs = stored_tensors(first, arch), stored_tensors(second, arch)
    if set(ours) != set(theirs):
        return 0, sorted(set(ours) ^ set(theirs))
    compared, different = 0, []
    for name, left in ours.items():
        right = theirs[name]
        step = max(1, BLOCK_BYTES // max(1, left.dtype.itemsize * int(np.prod(left.shape[1:]))))
        same = left.shape == right.shape and left.dtype == right.dtype
        for begin in range(0, left.shape[0] if same else 0, step):
            end = min(begin + step, left.shape[0])
            one, other = left.rows(begin, end), right.rows(begin, end)
            same = same and torch.equal(one.view(torch.int16), other.view(torch.int16))
            compared += one.nbytes
        if not same:
            different.append(name)
    return compared, different


def measure(directory: Path, arch: Architecture, seed: int) -> dict[str, Any]:
    """Make, convert, convert back, compare."""
    hf, run, back = directory / "hf", directory / "run", directory / "back"
    num_bytes = make_model(hf, arch, seed)
    print(f"{num_bytes / 1e9:.2f} GB of random weights in {hf}", flush=True)
    convert = str(ROOT / "tools" / "convert")
    rows = {"hf-to-megatron": watched([convert, "hf-to-megatron", "--hf", str(hf), "--out", str(run)])}
    rows["megatron-to-hf"] = watched([convert, "megatron-to-hf", "--checkpoint", str(run), "--out", str(back)])
    compared, different = differences(hf, back, arch)
    if different or compared != num_bytes:
        raise SystemExit(f"not the same after there and back ({compared} of {num_bytes} bytes compared): {different}")
    return {"bytes": num_bytes, "bytes_compared": compared, "tensors_that_differ": len(different), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="a directory on a disk with enough room")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-8b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arch = PRESETS[arguments.preset]
    needed = int(3.1 * sum(entry.num_bytes for entry in entries_of(arch)))
    free = shutil.disk_usage(arguments.directory).free
    if free < needed:
        parser.error(f"--directory: {needed / 1e9:.0f} GB are needed, {arguments.directory} has {free / 1e9:.0f} free")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as work:
        found = measure(Path(work), arch, arguments.seed)
    print(f"{'':16s}{'VmHWM':>10s}{'PSS':>10s}{'time':>9s}{'GB/s':>8s}")
    for name, row in found["rows"].items():
        print(f"{name:16s}{row['vmhwm_bytes'] / 1e9:7.2f} GB{row['pss_bytes'] / 1e9:7.2f} GB"
              f"{row['seconds']:7.0f} s{found['bytes'] / row['seconds'] / 1e9:8.2f}")  # fmt: skip
    print(f"{found['bytes_compared'] / 1e9:.2f} GB compared after there and back: equal bit for bit")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
    }
    if arguments.preset == "qwen3-8b":
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"preset": arguments.preset, "machine": machine, **found}, indent=1) + "\n")
    worst = max(row["vmhwm_bytes"] for row in found["rows"].values())
    print(f"largest: {worst / 1e9:.2f} GB, limit {LIMIT_BYTES / 1e9:.0f} GB: {'ok' if worst < LIMIT_BYTES else 'OVER'}")
    return int(worst >= LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
