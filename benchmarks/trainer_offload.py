"""How fast a trainer's state leaves its device and comes back, beside a plain copy of as many bytes.

    python benchmarks/trainer_offload.py [--rounds N] [--hidden-size H] [--layers L] [--out FILE]

One rank, bfloat16 weights with float32 copies and two moments, as they stand after an update. On a GPU the host side is
pinned memory. On a CPU both sides are the same memory: what is seen there is the cost of copying and of walking over
the storages, no bandwidth of a bus. The plain copy is of one tensor of the same size, in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_klear import parallel
from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import (
    Architecture,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.model import build_qwen3
from megatron_klear.records import TrainSequence
from megatron_klear.trainer import PARTS, Trainer, make_trainable

ROOT = Path(__file__).resolve().parents[1]


def trained(hidden_size: int, layers: int) -> Trainer:
    """A trainer after one update, so that its optimizer has all its state."""
    arch = Architecture(
        num_layers=layers, hidden_size=hidden_size, ffn_hidden_size=3 * hidden_size,
        num_attention_heads=hidden_size // 64, num_query_groups=max(1, hidden_size // 256), head_dim=64,
        vocab_size=8192, max_position_embeddings=512, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=False,
        init_std=0.02,
    )  # fmt: skip
    sizes = ParallelSettings()
    context = parallel.start(sizes)
    model_settings = ModelSettings(**asdict(arch), dtype="bfloat16")
    settings = Settings(
        run=RunSettings(dir="unused"), tokenizer=TokenizerSettings(dir="unused"), model=model_settings, parallel=sizes,
        packing=PackingSettings(token_budget=512),
    )  # fmt: skip
    model = build_qwen3(arch, model_settings, sizes, context)
    trainer = Trainer(make_trainable(model, OptimizerSettings(), sizes, total_updates=4), arch, settings, context)
    zeros = np.zeros(64, np.float32)
    weights = (np.arange(64) > 0).astype(np.float32) / 63
    sequence = TrainSequence(
        sequence_id="one", token_ids=np.arange(64), policy_weight=zeros, lm_weight=weights, advantages=zeros,
        old_logprobs=zeros, rollout_logprobs=zeros,
    )  # fmt: skip
    trainer.update([sequence], PolicyObjective(), step=1)
    return trainer


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes, a GPU's part included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(trainer: Trainer, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of every part, out and back, and of the plain copies, which take turns with them."""
    rows = []
    for part in PARTS:
        num_bytes = trainer.memory.num_bytes(part)
        device = torch.zeros(num_bytes, dtype=torch.uint8, device=trainer.context.device)
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.is_cuda)
        trainer.memory.offload(part)  # the first time allocates on the host
        trainer.memory.restore(part)
        seconds: dict[str, list[float]] = {"out": [], "back": [], "plain_out": [], "plain_back": []}
        for _ in range(rounds):
            seconds["out"].append(timed(lambda p=part: trainer.memory.offload(p)))
            assert trainer.memory.num_bytes(part) == 0
            seconds["back"].append(timed(lambda p=part: trainer.memory.restore(p)))
            seconds["plain_out"].append(timed(lambda h=host, d=device: h.copy_(d)))
            seconds["plain_back"].append(timed(lambda h=host, d=device: d.copy_(h)))
        medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
        rows.append({"part": part, "bytes": num_bytes, **medians})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trainer_offload.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = trained(options.hidden_size, options.layers)
    rows = measure(trainer, options.rounds)
    print(f"{'part':<10} {'MB':>8} {'out GB/s':>9} {'back GB/s':>10} {'plain copy out, back GB/s':>26}")
    for row in rows:
        speed = {
            name: row["bytes"] / 1e9 / row[f"{name}_seconds"] for name in ("out", "back", "plain_out", "plain_back")
        }
        print(f"{row['part']:<10} {row['bytes'] / 1e6:8.1f} {speed['out']:9.2f} {speed['back']:10.2f} "
              f"{speed['plain_out']:18.2f} {speed['plain_back']:7.2f}")  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    parameters = sum(p.numel() for p in trainer.trainable.model.parameters())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device, "torch": torch.__version__,
        "rounds": options.rounds, "parameters": parameters, "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    parallel.stop()


if __name__ == "__main__":
    main()
