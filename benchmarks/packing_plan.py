"""How full the bins of an epoch are, how even the ranks, and what planning it costs; on one core.

    python benchmarks/packing_plan.py [--seed 0] [--sequences 1500000] [--out benchmarks/results/packing_plan.json]

Lengths are those of long chains of thought: log-normal with a mean of about 10,000 tokens, cut at 32,768. Slots used is
the share of all bins' tokens that are real ones (padding to multiples of 32 counts as waste). Work is that of Qwen3-8B:
matrix products linear in the tokens, causal attention quadratic in each sequence's length; per step, the spread is the
rank with the most over the rank with the least, minus 1. The last step of an epoch is left out: it has what is left.
Every rank plans, so a machine needs the memory as many times as it has ranks; what a process holds anyway (torch,
lengths) is told apart from what planning takes.

The second table has steps of a fixed number of sequences, each packed by itself for its ranks (sft.batch_sequences and
RL): there, the share of positions that the model computes which are real tokens, as microbatches end where tokens do.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_klear.config import BIN_MULTIPLE, PRESETS
from megatron_klear.observe.memory import host_peak_bytes, read_memory, reset_peaks
from megatron_klear.packing import (
    EpochBins,
    attention_share,
    deal_bins,
    plan_bins,
    plan_packs,
    sequence_cost,
    sequence_multiple,
)

BUDGET = 32768
AIM_SLOTS, AIM_SPREAD, AIM_SECONDS, AIM_BYTES = 0.98, 0.03, 60.0, 2e9
SHARE = attention_share(PRESETS["qwen3-8b"])
EPOCH_CASES = ((128, (8, 16, 32)), (64, (8, 16)))
"""Bins of a step, and data-parallel ranks that its bins are dealt to."""
STEP_CASES = ((128, 1, 1), (128, 8, 1), (128, 8, 2), (128, 16, 1), (128, 32, 1), (512, 8, 1), (2048, 32, 1))
"""Sequences of a step that is packed by itself, data and context parallel size."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Data-parallel ranks of the steps of an epoch: mean and worst spread of their work."""

    bins_per_step: int
    dp: int
    mean: float
    worst: float
    sequences_per_step: float
    sequences_deviation: float


@dataclass(frozen=True, kw_only=True)
class ByStep:
    """Steps packed by themselves: positions that are real tokens, and spread of the ranks' work, mean over steps."""

    sequences: int
    dp: int
    cp: int
    slots_used: float
    spread: float
    milliseconds: float


def draw_lengths(count: int, seed: int) -> NDArray[np.int64]:
    """Lengths of long chains of thought; the cut leaves a mean of about 10,000."""
    drawn = np.random.default_rng(seed).lognormal(np.log(7600), 0.8, size=count)
    return np.clip(drawn, 64, BUDGET).astype(np.int64)


def plan(lengths: NDArray[np.int64], bins_per_step: int, seed: int) -> EpochBins:
    """Plan the first epoch."""
    return plan_bins(
        lengths,
        token_budget=BUDGET,
        bins_per_step=bins_per_step,
        multiple=BIN_MULTIPLE,
        share=SHARE,
        seeds=(seed, 0),
    )


def spreads(lengths: NDArray[np.int64], planned: EpochBins, ranks: tuple[int, ...]) -> list[Spread]:
    """Deal every full step to the ranks and compare their work."""
    padded = -(-lengths // BIN_MULTIPLE) * BIN_MULTIPLE
    cost = np.add.reduceat(sequence_cost(padded[planned.rows], SHARE), planned.starts[:-1])
    steps = planned.num_steps - 1
    cost = cost[: steps * planned.bins_per_step].reshape(steps, -1)
    counts = np.diff(planned.starts)[: cost.size].reshape(cost.shape).sum(axis=1)
    found = []
    for dp in ranks:
        work = np.array([row[deal_bins(row, dp)].sum(axis=1) for row in cost])
        spread = work.max(axis=1) / work.min(axis=1) - 1
        found.append(
            Spread(
                bins_per_step=planned.bins_per_step,
                dp=dp,
                mean=float(spread.mean()),
                worst=float(spread.max()),
                sequences_per_step=float(counts.mean()),
                sequences_deviation=float(counts.std() / counts.mean()),
            )
        )
    return found


def by_step(lengths: NDArray[np.int64], sequences: int, dp: int, cp: int, steps: int = 50) -> ByStep:
    """Pack so many steps of so many sequences, each by itself."""
    slots, spread, seconds = [], [], []
    for number in range(steps):
        some = lengths[number * sequences : (number + 1) * sequences]
        start = time.perf_counter()
        packed = plan_packs(some, token_budget=BUDGET * cp, dp_size=dp, multiple=sequence_multiple(cp), share=SHARE)
        seconds.append(time.perf_counter() - start)
        work = [sum(sequence_cost(some[list(m)], SHARE).sum() for m in rank) for rank in packed.microbatches]
        slots.append(some.sum() / packed.tokens.sum())
        spread.append(max(work) / min(work) - 1)
    return ByStep(
        sequences=sequences,
        dp=dp,
        cp=cp,
        slots_used=float(np.mean(slots)),
        spread=float(np.mean(spread)),
        milliseconds=1000 * float(np.mean(seconds)),
    )


def main() -> int:
    """Measure, print, write; exit status 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=1_500_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing_plan.json")
    options = parser.parse_args()
    lengths = draw_lengths(options.sequences, options.seed)
    reset_peaks()
    resident = read_memory().host_used_bytes
    before, cpu_before = time.perf_counter(), time.process_time()
    (bins_per_step, ranks), *others = EPOCH_CASES
    planned = plan(lengths, bins_per_step, options.seed)
    seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
    peak = host_peak_bytes()
    num_bins = len(planned.starts) - 1
    used = float(lengths.sum()) / (num_bins * BUDGET)
    print(
        f"{len(lengths)} sequences, mean {lengths.mean():.0f} tokens, {np.mean(lengths == BUDGET):.1%} cut at {BUDGET}"
        f": {num_bins} bins, {used:.2%} of slots used,\nplanned in {seconds:.1f} s ({cpu_seconds:.1f} s of one core), "
        f"peak of the process {peak / 1e6:.0f} MB, of which planning took {(peak - resident) / 1e6:.0f} MB\n"
    )
    rows = spreads(lengths, planned, ranks)
    for bins, dp_sizes in others:
        rows += spreads(lengths, plan(lengths, bins, options.seed), dp_sizes)
    print("whole epoch packed (sft.batch_bins)\n bins/step   dp   spread mean    worst   sequences/step")
    for row in rows:
        deviation = f"{row.sequences_per_step:.0f} +- {row.sequences_deviation:.1%}"
        print(f"{row.bins_per_step:>10}{row.dp:>5}{row.mean:>14.2%}{row.worst:>9.2%}{deviation:>17}")
    steps = [by_step(lengths, count, dp, cp, 20 if count > 1000 else 50) for count, dp, cp in STEP_CASES]
    print("\nsteps packed by themselves\n sequences   dp   cp   slots used   spread   ms/plan")
    for one in steps:
        layout = f"{one.sequences:>10}{one.dp:>5}{one.cp:>5}"
        print(f"{layout}{one.slots_used:>13.2%}{one.spread:>9.1%}{one.milliseconds:>10.1f}")
    worst = max(row.worst for row in rows)
    reached = used >= AIM_SLOTS and worst <= AIM_SPREAD and seconds <= AIM_SECONDS and peak <= AIM_BYTES
    print(
        f"\naims ({AIM_SLOTS:.0%} of slots, spread {AIM_SPREAD:.0%}, 60 s, 2 GB): {'reached' if reached else 'MISSED'}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "seed": options.seed,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "sequences": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "bins": num_bins,
        "slots_used": used,
        "plan_seconds": seconds,
        "plan_cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "planning_bytes": peak - resident,
        "epoch": [asdict(row) for row in rows],
        "by_step": [asdict(one) for one in steps],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
