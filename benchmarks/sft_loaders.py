"""How fast SFT microbatches are read and packed, by a thread and by NVIDIA DALI, and how long steps wait for them.

    python benchmarks/sft_loaders.py [--sequences 1500] [--out benchmarks/results/sft_loaders.json]

Random tokens in conversations of the lengths of long chains of thought (log-normal, mean about 10,000, cut at 32,768),
in an index of Megatron's format, are read in steps of 8 full bins of 32,768 tokens for one data-parallel rank of two.
First as fast as they come; then beside a step that computes so many tokens per second (it sleeps), where the share of
the step spent waiting is told. The first step is left out: for DALI it has the start of its processes.
On a machine with a GPU microbatches go there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_klear.config import BIN_MULTIPLE, PRESETS, dali_installed
from megatron_klear.data import BinSteps, SftData, SftIndex
from megatron_klear.data.index import files
from megatron_klear.packing import attention_share
from megatron_klear.trainer import PackLayout, SftLoader, SftReader
from megatron_klear.trainer.loading import PlainLoader

BUDGET, BINS, RANKS = 32768, 8, 2


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One pass over the data: tokens of this rank per second, and the share of a step's time spent waiting."""

    loader: str
    processes: int
    step_tokens_per_second: float | None
    tokens: int
    tokens_per_second: float
    waiting_share: float


def write_index(directory: Path, sequences: int) -> SftIndex:
    """An index of random tokens; a tenth of each conversation is its prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(7600), 0.8, size=sequences), 64, BUDGET).astype(np.int64)
    prefix = files.index_prefix(directory, files.CONVERSATIONS)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    for length in lengths.tolist():
        prompt = length // 10
        tokens = rng.integers(0, 150_000, size=length, dtype=np.int32)
        builder.add_document(tokens, [prompt, length - prompt], [0, files.TRAINED_MODE])
    builder.finalize(f"{prefix}.idx")
    pq.write_table(pa.table({"id": [f"r{n}" for n in range(sequences)]}), directory / files.ROWS)
    manifest = {"files": [], "sources": [], "conversations": sequences, "rejected": 0, "fingerprint": ""}
    (directory / files.MANIFEST).write_text(json.dumps({**manifest, "sizes": {}, "digests": {}}))
    return SftIndex(directory)


def open_one(kind: str, reader: SftReader, device: torch.device, processes: int) -> SftLoader:
    """The loader to measure."""
    if kind == "plain":
        return PlainLoader(reader, device)
    from megatron_klear.trainer.dali_loading import DaliLoader

    return DaliLoader(reader, device, processes=processes)


def measure(
    data: SftData, kind: str, device: torch.device, *, processes: int = 0, rate: float | None = None
) -> Measurement:
    """Read an epoch, beside a step that computes `rate` tokens per second of this rank."""
    steps = BinSteps(
        data.lengths,
        batch_bins=BINS,
        token_budget=BUDGET,
        multiple=BIN_MULTIPLE,
        share=attention_share(PRESETS["qwen3-8b"]),
        seed=0,
    )
    num_steps = steps.steps_for_epochs(1) - 1
    num_steps = num_steps if rate is None else min(num_steps, 12)
    reader = SftReader(data, copy.deepcopy(steps), PackLayout(token_budget=BUDGET, dp_size=RANKS), num_steps=num_steps)
    waited, start, tokens = 0.0, 0.0, 0
    with open_one(kind, reader, device, processes) as loader, contextlib.suppress(StopIteration):
        for number in range(num_steps):
            if number == 1:
                waited, start, tokens = 0.0, time.perf_counter(), 0
            asked = time.perf_counter()
            batch = loader.next_step()
            waited += time.perf_counter() - asked
            mine = sum(int(pack.token_ids.numel()) for pack in batch.minibatch.packs)
            tokens += mine
            if rate is not None:
                time.sleep(mine / rate)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Measurement(
        loader=kind,
        processes=processes,
        step_tokens_per_second=rate,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        waiting_share=waited / seconds,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sft_loaders.json")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        data = SftData(write_index(Path(directory), options.sequences), token_budget=BUDGET, multiple=BIN_MULTIPLE)
        print(f"{len(data)} conversations, {int(data.lengths.sum())} tokens; {os.cpu_count()} CPUs, {device}\n")
        print("loader    processes   step's tokens/s   tokens/s read   waiting")
        loaders = [("plain", 0)] + [("dali", count) for count in (1, 2) if dali_installed()]
        for rate in (None, 200_000.0, 2_000_000.0):
            for kind, processes in loaders:
                row = measure(data, kind, device, processes=processes, rate=rate)
                rows.append(row)
                asked = "-" if rate is None else f"{rate:,.0f}"
                speed = f"{row.tokens_per_second:,.0f}"
                print(f"{kind:<9}{processes or '':>10}{asked:>18}{speed:>16}{row.waiting_share:>10.1%}")
    report = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
