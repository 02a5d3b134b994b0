"""The table, the file, and what was to be reached."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from klear_kernels.linear_policy_loss.benchmark.problem import Exact, worst_row_error

_PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl")
_HEADINGS = (
    f"{'':<28}{'p50 ms':>10}{'p95 ms':>10}{'useful':>10}{'executed':>10}{'of the':>9}{'peak':>10}"
    f"{'logprob':>11}{'':>11}{'dX':>10}{'dW':>10}\n"
    f"{'':<28}{'':>10}{'':>10}{'TFLOP/s':>10}{'TFLOP':>10}{'products':>9}{'MiB':>10}"
    f"{'relative':>11}{'nats':>11}{'worst row':>10}{'worst row':>10}"
)


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures were measured with."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    on_cpu = "a CPU run: good for the error columns; its times and memory say nothing about a GPU"
    return {
        "note": on_cpu if device.type == "cpu" else "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {_processor()}",
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": versions,
        "commit": commit if commit is None or not changed else f"{commit} with changes",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def rounding(exact: Exact, operation: str) -> dict[str, float] | None:
    """Errors of exact logits whose gradient is rounded once, the measure for the gradients' errors."""
    if operation not in exact.grad_hidden:
        return None
    return {
        "grad_hidden_error": worst_row_error(exact.rounded_hidden[operation], exact.grad_hidden[operation]),
        "grad_weight_error": worst_row_error(exact.rounded_weight[operation], exact.grad_weight[operation]),
    }


def table(size: dict[str, Any]) -> str:
    """One size's rows as text."""
    lines = [
        f"N {size['tokens']}, V {size['words']}, H {size['hidden_size']}, {size['dtype']}; "
        f"log-sum-exp {size['median_logsumexp']:.1f}, probability of the label {size['label_probability']}"
    ]
    for operation in dict.fromkeys(row["operation"] for row in size["rows"]):
        lines += ["", operation, _HEADINGS]
        lines += [_line(row) for row in size["rows"] if row["operation"] == operation]
        exact = size["rounding"].get(operation)
        if exact is not None:
            errors = f"{exact['grad_hidden_error']:>10.1e}{exact['grad_weight_error']:>10.1e}"
            lines.append(f"{'exact logits, rounded once':<109}{errors}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if row["missing"] is not None:
        return f"{row['name']:<28}  takes no part: {row['missing']}"
    if row["error"] is not None:
        return f"{row['name']:<28}  raised {row['error']}"
    peak = None if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / 2**20
    return (
        f"{row['name']:<28}{row['p50_ms']:>10.3f}{row['p95_ms']:>10.3f}{row['useful_tflops']:>10.4g}"
        f"{row['executed_tflop']:>10.4g}{_or_dash(row['fraction_of_products'], '.3f', 9)}{_or_dash(peak, '.0f', 10)}"
        f"{_or_dash(row['logprob_error'], '.1e', 11)}{_or_dash(row['logprob_error_nats'], '.1e', 11)}"
        f"{_or_dash(row['grad_hidden_error'], '.1e', 10)}{_or_dash(row['grad_weight_error'], '.1e', 10)}"
    )


def _or_dash(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def goals(size: dict[str, Any]) -> list[dict[str, Any]]:
    """What the fused head is to reach on one H100 at N 32768 and V 151936, each with the figure of this run.

    Ours is the fastest backend of ours in the operation: adding to a main_grad where time and memory are measured
    against the products alone, returning the gradient as the others do where it is compared with them.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, value: float | None, limit: float, *, at_most: bool) -> None:
        met = None if value is None else (value <= limit if at_most else value >= limit)
        found.append({"goal": what, "value": value, "limit": limit, "met": met})

    for operation, gigabytes in (("policy", 3.0), ("logprob", 0.3)):
        ours = _fastest(size, operation, "ours")
        if ours is None:
            continue
        alone = _fastest(size, operation, "ours in place") or ours
        fraction = alone["fraction_of_products"]
        add(
            f"{operation}: time over its products alone", None if fraction is None else 1 / fraction, 1.15, at_most=True
        )
        peak = alone["peak_extra_bytes"]
        add(f"{operation}: transient GB", None if peak is None else peak / 1e9, gigabytes, at_most=True)
        peer = _fastest(size, operation, "peer")
        add(f"{operation}: speed over the fastest peer", _ratio(peer, ours), 1.2, at_most=False)
    ours, scalar = _fastest(size, "lm", "ours"), _fastest(size, "lm", "peer")
    if ours is not None:
        add("lm: speed over the fastest peer, scalar-only ones included", _ratio(scalar, ours), 1.0, at_most=False)
    ours = _fastest(size, "policy", "ours")
    exact = size["rounding"].get("policy")
    if ours is not None and exact is not None:
        for gradient in ("grad_hidden_error", "grad_weight_error"):
            add(
                f"policy: {gradient} over exact logits rounded once",
                ours[gradient] / exact[gradient],
                1.5,
                at_most=True,
            )
    return found


def _fastest(size: dict[str, Any], operation: str, kind: str) -> dict[str, Any] | None:
    timed = [
        row
        for row in size["rows"]
        if row["operation"] == operation and row["kind"] == kind and row["p50_ms"] is not None
    ]
    return min(timed, key=lambda row: row["p50_ms"], default=None)


def _ratio(slower: dict[str, Any] | None, faster: dict[str, Any]) -> float | None:
    return None if slower is None else slower["p50_ms"] / faster["p50_ms"]


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1, allow_nan=True) + "\n")
    part.replace(path)


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
