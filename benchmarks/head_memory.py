"""Peak memory and time of the fused head against full logits, on this machine's CPU.

    python benchmarks/head_memory.py [--repeats N] [--threads N] [--hidden-size H] [--sizes T:V ...] [--out FILE]

Every measurement is a process of its own, so that one variant's peak does not hide the other's. Variants
take turns within a round, so that a busy machine slows all of them. Peak memory is what the resident set grew by
during forward and backward, inputs not counted; it includes the gradients, which both variants must return.
The table's seconds are processor time, which other work on the machine hardly changes; wall time is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SIZES = ("1024:32768", "1024:151936", "2048:151936")
OPERATIONS = ("logprob", "loss and gradients")
VARIANTS = ("full logits", "klear")
AGREEMENT = 1e-3
"""Largest relative difference between the variants' results; a benchmark of wrong numbers is worthless."""


def measure(operation: str, variant: str, tokens: int, words: int, hidden_size: int) -> dict[str, float]:
    """Run one variant once in this process, after a tiny warm-up.

    Returns processor and wall seconds, peak extra MiB, and a number that both variants must agree on.
    """
    run = _runner(operation, variant)
    run(*_inputs(8, 64, hidden_size))
    inputs = _inputs(tokens, words, hidden_size)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    check = run(*inputs)
    after, wall_seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return {
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_seconds": wall_seconds,
        "peak_mib": (after.ru_maxrss - before.ru_maxrss) * unit / 2**20,
        "check": check,
    }


def _inputs(tokens: int, words: int, hidden_size: int) -> tuple[Any, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)
    # Drawn in place: no temporary may raise the high-water mark before the measurement.
    hidden = torch.empty(tokens, hidden_size).normal_(generator=generator)
    weight = torch.empty(words, hidden_size).normal_(std=3.0 * hidden_size**-0.5, generator=generator)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    old_logprobs = torch.empty(tokens).normal_(mean=-15.0, std=3.0, generator=generator)
    advantages = torch.empty(tokens).normal_(generator=generator)
    weights = torch.full((tokens,), 1.0 / tokens)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, old_logprobs, advantages, weights, 0.1 * weights


def _runner(operation: str, variant: str) -> Callable[..., float]:
    import torch

    from klear_kernels import linear_logprob, linear_policy_loss
    from megatron_klear.algorithm import PolicyObjective, policy_token_loss

    objective = PolicyObjective(kind="gppo")

    def full_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)

    def logprob(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *_: torch.Tensor) -> float:
        with torch.no_grad():
            if variant == "full logits":
                return float(full_logprobs(hidden, weight, labels).sum())
            return float(linear_logprob(hidden, weight, labels, with_entropy=False).logprobs.sum())

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *terms: torch.Tensor) -> float:
        if variant == "full logits":
            old_logprobs, advantages, policy_weight, lm_weight = terms
            logprobs = full_logprobs(hidden, weight, labels)
            policy = policy_token_loss(logprobs, old_logprobs, advantages, objective)
            total = (policy_weight * policy - lm_weight * logprobs).sum()
        else:
            total = linear_policy_loss(hidden, weight, labels, *terms, objective=objective, with_entropy=False).loss
        total.backward()
        return float(hidden.grad.norm() + weight.grad.norm())

    return logprob if operation == "logprob" else loss


def measure_apart(arguments: argparse.Namespace, operation: str, variant: str, size: str) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--hidden-size", str(arguments.hidden_size), "--one", operation, variant, size]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{operation}, {variant}, {size} ended with status {result.returncode}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every size, operation and variant `repeats` times, variants taking turns; medians."""
    keys = [(operation, size) for size in arguments.sizes for operation in OPERATIONS]
    samples: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for round_number in range(arguments.repeats):
        for operation, size in keys:
            # The order turns around each round: neither variant always runs on the warmer machine.
            for variant in VARIANTS[:: 1 if round_number % 2 == 0 else -1]:
                sample = measure_apart(arguments, operation, variant, size)
                samples.setdefault((operation, size, variant), []).append(sample)
                print(f"  {size:>12}  {operation:<20} {variant:<12} {sample['cpu_seconds']:7.2f} s", file=sys.stderr)
    rows = []
    for operation, size in keys:
        tokens, words = (int(number) for number in size.split(":"))
        row: dict[str, Any] = {"operation": operation, "tokens": tokens, "words": words}
        for variant in VARIANTS:
            taken = samples[operation, size, variant]
            row[variant] = {name: statistics.median(sample[name] for sample in taken) for name in taken[0]}
        full, ours = row["full logits"]["check"], row["klear"]["check"]
        if abs(full - ours) > AGREEMENT * abs(full):
            raise SystemExit(f"{operation} at {size}: the variants disagree, {full} and {ours}")
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], hidden_size: int) -> None:
    """Print one line per size and operation."""
    print(
        f"hidden size {hidden_size}, float32; peak: growth of the resident set, inputs not counted, gradients included"
    )
    print(f"{'operation':<20}{'T':>6}{'V':>8}   {'peak MiB':>20}{'less by':>9}   {'processor s':>16}{'speed':>8}")
    print(f"{'':<34}   {'full':>10}{'klear':>10}{'':>9}   {'full':>8}{'klear':>8}")
    for row in rows:
        full, ours = row["full logits"], row["klear"]
        memory = full["peak_mib"] / max(ours["peak_mib"], 1.0)
        speed = full["cpu_seconds"] / ours["cpu_seconds"]
        print(
            f"{row['operation']:<20}{row['tokens']:>6}{row['words']:>8}   "
            f"{full['peak_mib']:>10.0f}{ours['peak_mib']:>10.0f}{memory:>8.1f}x   "
            f"{full['cpu_seconds']:>8.2f}{ours['cpu_seconds']:>8.2f}{speed:>7.2f}x"
        )


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else "unknown"

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": git("status", "--porcelain") != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": "cpu",
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "hidden_size": arguments.hidden_size,
        "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(DEFAULT_SIZES), help="tokens:words (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "head_memory.json")
    parser.add_argument("--one", nargs=3, metavar=("OPERATION", "VARIANT", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        operation, variant, size = arguments.one
        tokens, words = (int(number) for number in size.split(":"))
        print(json.dumps(measure(operation, variant, tokens, words, arguments.hidden_size)))
        return
    rows = run_all(arguments)
    print_table(rows, arguments.hidden_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**provenance(arguments), "rows": rows}, indent=2) + "\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
