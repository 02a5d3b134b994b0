"""Runs the contestants in turns on the same inputs: time, memory, errors; one that raises loses only its own row."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from klear_kernels.linear_policy_loss.benchmark.contestants import USEFUL_PRODUCTS, Contestant, Outcome
from klear_kernels.linear_policy_loss.benchmark.problem import (
    Exact,
    HeadInputs,
    worst_logprob_error,
    worst_row_error,
)

_WARM_UPS = 2
"""Runs before the timed ones: compilation, autotuning, the allocator's growth."""


def measure(
    entered: list[Contestant], operation: str, inputs: HeadInputs, exact: Exact, *, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """One row per contestant that has this operation, in the order given.

    In each round every contestant runs once, in an order drawn anew, so that a machine that slows down or
    heats up slows all of them.
    """
    taking_part = [contestant for contestant in entered if operation in contestant.runs]
    rows = {contestant.name: _empty_row(contestant, operation) for contestant in taking_part}
    running = []
    for contestant in taking_part:
        if contestant.missing is None and _prepare(contestant, operation, inputs, exact, rows[contestant.name]):
            running.append(contestant)
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in running}
    order = random.Random(seed)
    for _ in range(rounds):
        for contestant in order.sample(running, len(running)):
            if rows[contestant.name]["error"] is not None:
                continue
            try:
                samples[contestant.name].append(_seconds(contestant, operation, inputs)[0])
            except Exception as error:
                _failed(rows[contestant.name], error)
    useful = USEFUL_PRODUCTS[operation] * inputs.flop_per_product
    for name, row in rows.items():
        if row["error"] is None and row["missing"] is None:
            row["p50_ms"], row["p95_ms"] = (1e3 * quantile(samples[name], q) for q in (0.5, 0.95))
            row["useful_tflops"] = useful / row["p50_ms"] / 1e9
            row["executed_tflop"] = row["executed_products"] * inputs.flop_per_product / 1e12
    floor = next((row["p50_ms"] for row in rows.values() if row["kind"] == "floor"), None)
    for row in rows.values():
        if floor is not None and row["p50_ms"] is not None:
            row["fraction_of_products"] = floor / row["p50_ms"]
    return list(rows.values())


def quantile(samples: list[float], q: float) -> float:
    """The q-quantile, by linear interpolation between the sorted samples."""
    values = sorted(samples)
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def _empty_row(contestant: Contestant, operation: str) -> dict[str, Any]:
    return {
        "operation": operation,
        "name": contestant.name,
        "kind": contestant.kind,
        "missing": contestant.missing,
        "error": None,
        "p50_ms": None,
        "p95_ms": None,
        "useful_tflops": None,
        "executed_products": contestant.executed_products[operation],
        "executed_tflop": None,
        "fraction_of_products": None,
        "peak_extra_bytes": None,
        "logprob_error": None,
        "logprob_error_nats": None,
        "grad_hidden_error": None,
        "grad_weight_error": None,
    }


def _prepare(contestant: Contestant, operation: str, inputs: HeadInputs, exact: Exact, row: dict[str, Any]) -> bool:
    """Warm up, compare with float64, measure memory; whether it can be timed."""
    try:
        for _ in range(_WARM_UPS):
            _seconds(contestant, operation, inputs)
        _free(inputs.hidden.device)
        before = _reset_peak(inputs.hidden.device)
        _, outcome = _seconds(contestant, operation, inputs)
        peak = _peak(inputs.hidden.device)
        if before is not None and peak is not None:
            gradients = sum(
                gradient.numel() * gradient.element_size()
                for gradient in (outcome.grad_hidden, outcome.grad_weight)
                if gradient is not None
            )
            row["peak_extra_bytes"] = max(peak - before - gradients, 0)
        _compare(outcome, operation, exact, row)
    except Exception as error:  # foreign code: whatever it raises is its result
        _failed(row, error)
        return False
    finally:
        _free(inputs.hidden.device)
    return True


def _compare(outcome: Outcome, operation: str, exact: Exact, row: dict[str, Any]) -> None:
    if outcome.logprobs is not None:
        row["logprob_error"], row["logprob_error_nats"] = worst_logprob_error(outcome.logprobs, exact.logprobs)
    if outcome.grad_hidden is not None:
        row["grad_hidden_error"] = worst_row_error(outcome.grad_hidden[exact.rows], exact.grad_hidden[operation])
    if outcome.grad_weight is not None:
        row["grad_weight_error"] = worst_row_error(outcome.grad_weight[exact.words], exact.grad_weight[operation])


def _failed(row: dict[str, Any], error: Exception) -> None:
    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _seconds(contestant: Contestant, operation: str, inputs: HeadInputs) -> tuple[float, Outcome]:
    """Run once; on a GPU the time between two events on its stream."""
    run = contestant.runs[operation]
    contestant.prepare(inputs)
    if inputs.hidden.device.type != "cuda":
        start = time.perf_counter()
        outcome = run(inputs)
        return time.perf_counter() - start, outcome
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    outcome = run(inputs)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, outcome


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # What the C library keeps of freed blocks would hide the growth that is to be measured.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new high-water mark; returns the bytes in use, None where the system cannot tell.

    On a CPU that is the process's resident set, which Linux keeps a mark of, and which a freed block may not leave.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
