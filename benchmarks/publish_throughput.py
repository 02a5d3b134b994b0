"""Bytes per second of every way to bring weights to an engine, against a plain copy in the same run.

    python benchmarks/publish_throughput.py [--layers 1] [--rounds 3] [--bucket-mb 256] [--device cpu]

Starts one real SGLang server with a Qwen3 of the 8B's widths and fewer layers and words, as memory allows, and
publishes to it by each transport, in turn, round by round. A publish is timed from pausing the engine to letting it go
on, checksums included (they are timed by themselves too). The plain copy is the same tensors copied once in memory.
The default of a run, `tensor` with `weight_sync.keep_on_disk`, writes each set to files, too. Beside the seconds stands
the most memory that this process, a trainer's first rank, had resident meanwhile (Linux's VmHWM), its weights included.
Prints a table, and writes it as JSON to benchmarks/results/publish_throughput.json (`--out`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_klear import parallel
from megatron_klear.config import Architecture, ParallelSettings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.model import hf_config
from megatron_klear.model.hf_names import tensor_rules
from megatron_klear.observe.memory import host_peak_bytes, reset_peaks
from megatron_klear.parallel import FirstRank
from megatron_klear.records import ParallelContext
from megatron_klear.rollout.sglang import Expected, ServerFleet, SglangEngine
from megatron_klear.weight_sync import (
    BucketSharing,
    DiskTransport,
    DistributedTransport,
    EngineGroup,
    EngineLayout,
    KeepingTransport,
    Publisher,
    SharedTransport,
    TensorTransport,
    Transport,
    WeightFiles,
)
from megatron_klear.weight_sync.checksums import ExpectedChecksums

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.origin import origin

RESULT = Path(__file__).with_name("results") / "publish_throughput.json"
LONGEST = 128
SHARED = "shared (each rank's own)"
"""What a colocated run takes: on a GPU handles of the trainer's memory, on a CPU files of shared memory."""
KEPT = "tensor, keep_on_disk"
"""What a run takes whose servers are on the trainer's machine, with the settings' defaults."""


def architecture(layers: int, vocab: int) -> Architecture:
    """Qwen3-8B's widths."""
    return Architecture(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=1024,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
        init_std=0.02,
    )


class Publishing:
    """One engine, and every transport to it.

    Args:
        arch: what it serves.
        engine: connected.
        context: one process's.
        bucket_bytes: size of a bucket.
        directory: for files of weights; on a real disk for a real figure.
    """

    def __init__(
        self, arch: Architecture, engine: SglangEngine, context: ParallelContext, bucket_bytes: int, directory: Path
    ) -> None:
        self.arch, self.context, self.bucket_bytes = arch, context, bucket_bytes
        facts = engine.engines[0].facts
        self.layout = EngineLayout(tp=facts.tp, device="cuda" if facts.device == "cuda" else "cpu", dtype="bfloat16")
        self.group = EngineGroup([engine.engines[0].caller], 600.0)
        device = torch.device(self.layout.device)
        self.sharing = BucketSharing(context)
        self.transports: dict[str, Transport] = {
            "disk": DiskTransport(self.group, WeightFiles(directory / "disk", hf_config(arch), keep=2)),
            "distributed": DistributedTransport(self.group, tp=facts.tp, device=device),
            "tensor (shared memory)": TensorTransport(self.group, tp=facts.tp, by_value=False),
            KEPT: KeepingTransport(
                TensorTransport(self.group, tp=facts.tp, by_value=False),
                WeightFiles(directory / "kept", hf_config(arch), keep=1),
            ),
            "tensor (by value)": TensorTransport(self.group, tp=facts.tp, by_value=True),
            SHARED: SharedTransport(self.group, self.sharing, lambda caller: [0]),
        }
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16).to(device)
            for rule in tensor_rules(arch)
            for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
        }
        self.num_bytes = sum(t.numel() * t.element_size() for t in self.weights.values())
        self.version = 0

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())

    def publish(self, name: str) -> float:
        """Seconds of a publish with checksums."""
        self.version += 1
        publisher = Publisher(
            self.group,
            self.transports[name],
            self.layout,
            head_dim=self.arch.head_dim,
            context=self.context,
            first_rank=FirstRank(self.context, silence_seconds=600.0),
            bucket_bytes=self.bucket_bytes,
            pause_mode="retract",
            verify_mode="checksum",
            sharing=self.sharing if name == SHARED else None,
        )
        return publisher.publish(self.stream(), version=self.version).seconds

    def checksums(self) -> float:
        """Seconds that both sides' checksums take, one after the other as in a publish."""
        start = time.perf_counter()
        expected = ExpectedChecksums(self.layout, head_dim=self.arch.head_dim, context=self.context)
        for _ in expected.watch(self.stream()):
            pass
        self.group.call("/weights_checker", {"action": "checksum"})
        return time.perf_counter() - start

    def copy(self) -> float:
        """Seconds of copying the tensors once."""
        start = time.perf_counter()
        for tensor in self.weights.values():
            tensor.clone()
        if self.layout.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(publishing: Publishing, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by contestant, one per round, and its peak of resident bytes; each is run once before, untimed."""
    contestants = {"plain copy": publishing.copy, "checksums alone": publishing.checksums} | {
        name: (lambda name=name: publishing.publish(name)) for name in publishing.transports
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = dict.fromkeys(contestants, 0)
    for number in range(rounds + 1):
        for name, run in contestants.items():
            reset_peaks()
            taken, peak = run(), host_peak_bytes()
            if number:
                seconds[name].append(taken)
                peaks[name] = max(peak, peaks[name])
    return seconds, peaks


def report(
    publishing: Publishing,
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Print the table and return what is kept."""
    size, copy = publishing.num_bytes, statistics.median(seconds["plain copy"])
    rows = {}
    print(f"{size / 1e9:.2f} GB, median of {arguments.rounds} rounds")
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] = {
            "seconds": [round(v, 4) for v in values],
            "gigabytes_per_second": round(size / median / 1e9, 4),
            "of_plain_copy": round(copy / median, 4),
            "peak_resident_bytes": peaks[name],
        }
        rate = f"{median:8.3f} s {size / median / 1e9:8.3f} GB/s {copy / median:8.1%} of a plain copy"
        print(f"{name:24s} {rate}, at most {peaks[name] / 1e9:.2f} GB resident")
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "venv")}
    return {"bytes": size, "arguments": given, "threads": torch.get_num_threads(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="of the model (the 8B: 36)")
    parser.add_argument("--vocab", type=int, default=16384, help="words (the 8B: 151936)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--venv", default=".venv-sglang", help="SGLang's environment")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    arguments = parser.parse_args()
    told = origin(Path(arguments.venv))
    context = parallel.start(ParallelSettings(), device=arguments.device)
    arch = architecture(arguments.layers, arguments.vocab)
    # A GPU holds both: this process's weights and the server.
    settings = SglangSettings(venv=arguments.venv, memory_fraction=0.5 if arguments.device == "cuda" else None)
    with tempfile.TemporaryDirectory() as folder:
        fleet = ServerFleet(
            settings, hf_config(arch), Path(folder), dtype="bfloat16", on_cpu=arguments.device == "cpu",
            batch_responses=4, longest_sequence=LONGEST,
        )  # fmt: skip
        with fleet:
            expected = Expected(vocab_size=arch.vocab_size, longest_sequence=LONGEST)
            engine = SglangEngine(fleet.start_all(), settings, expected, in_flight=4)
            publishing = Publishing(arch, engine, context, arguments.bucket_mb * 2**20, Path(folder) / "weights")
            result = report(publishing, *measure(publishing, arguments.rounds), arguments)
            for transport in publishing.transports.values():
                transport.close()
            engine.close()
    arguments.out.parent.mkdir(exist_ok=True)
    result = told | {"load_average_after": [round(load, 2) for load in os.getloadavg()]} | result
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    parallel.stop()


if __name__ == "__main__":
    main()
