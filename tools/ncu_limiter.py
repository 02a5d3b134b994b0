"""What Nsight Compute measured, per kernel, in words: how fast, and what holds it back.

    ncu --csv --print-units base --metrics "$(python tools/ncu_limiter.py --metrics)" ... | python tools/ncu_limiter.py

Reads the CSV that ncu writes, one line per launch and metric, whatever it prints before. Launches of one kernel are
put together, weighted by their time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

TIME = "gpu__time_duration.sum"
BYTES = "dram__bytes.sum"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"

UNITS = {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "the matrix instructions",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "the device memory's bandwidth",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "the L2 cache's bandwidth",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed": "L1 and shared memory",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": "the rate at which instructions are issued",
}
"""Units of the device whose use is given in percent of their peak over the whole time of the kernel."""

_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = {
    _STALL.format("long_scoreboard"): "data from memory or the L2 cache",
    _STALL.format("short_scoreboard"): "shared memory or special functions",
    _STALL.format("barrier"): "other warps at a barrier",
    _STALL.format("membar"): "a memory barrier",
    _STALL.format("math_pipe_throttle"): "a busy arithmetic unit",
    _STALL.format("lg_throttle"): "the queue of memory instructions",
    _STALL.format("mio_throttle"): "the queue of shared-memory instructions",
    _STALL.format("wait"): "the fixed latency of their own instructions",
    _STALL.format("gmma"): "a matrix instruction of their warp group",
}
"""What warps that could not issue were waiting for."""

METRICS = (TIME, BYTES, WARPS, *UNITS, *STALLS)
BUSY, HARDLY_BUSY = 80.0, 60.0
"""Percent of peak from which a unit is the limit, and below which none is."""


@dataclass
class Kernel:
    """The launches of one kernel: their number, time, and sums of metric times time."""

    name: str
    launches: int = 0
    nanoseconds: float = 0.0
    bytes_moved: float | None = None
    weighted: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: dict[str, float]) -> None:
        """Take in one launch."""
        time = metrics[TIME]
        self.launches += 1
        self.nanoseconds += time
        if BYTES in metrics:
            self.bytes_moved = (self.bytes_moved or 0.0) + metrics[BYTES]
        for name, value in metrics.items():
            if name not in (TIME, BYTES):
                self.weighted[name] = self.weighted.get(name, 0.0) + value * time

    def mean(self, metric: str) -> float | None:
        """The metric's mean over time, None where ncu did not give it."""
        return self.weighted[metric] / self.nanoseconds if metric in self.weighted and self.nanoseconds else None

    def limiter(self) -> str:
        """One sentence."""
        use = {metric: value for metric in UNITS if (value := self.mean(metric)) is not None}
        if not use:
            return "ncu gave the use of no unit"
        busiest = max(use, key=lambda metric: use[metric])
        figure = f"{UNITS[busiest]}, used at {use[busiest]:.0f} % of their peak"
        if use[busiest] >= BUSY:
            return f"limited by {figure}"
        waits = {metric: value for metric in STALLS if (value := self.mean(metric)) is not None}
        waiting = f"; warps wait mostly for {STALLS[max(waits, key=lambda metric: waits[metric])]}" if waits else ""
        occupancy = self.mean(WARPS)
        resident = "" if occupancy is None else f"; {occupancy:.0f} % of the warps that fit are there"
        if use[busiest] >= HARDLY_BUSY:
            return f"nearest to the limit of {figure}{waiting}{resident}"
        return f"limited by latency: the busiest is {figure}{waiting}{resident}"


def parse(lines: Iterable[str]) -> list[Kernel]:
    """Read ncu's CSV; kernels by time, the longest first.

    Raises:
        ValueError: there is no CSV in it, or a launch has no time.
    """
    rows = iter(lines)
    header = next((line for line in rows if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError('found no line that begins with "ID"; was ncu run with --csv?')
    columns = next(csv.reader([header]))
    missing = {"Kernel Name", "Metric Name", "Metric Value"} - set(columns)
    if missing:
        raise ValueError(f"found no column {', '.join(sorted(missing))}; ncu must not be run with --page raw")
    launches: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader((line for line in rows if line.startswith('"')), fieldnames=columns):
        name, metrics = launches.setdefault(row["ID"], (row["Kernel Name"], {}))
        del name
        value = _number(row["Metric Value"])
        if value is not None:
            metrics[row["Metric Name"]] = value * _scale(row.get("Metric Unit") or "")
    kernels: dict[str, Kernel] = {}
    for identity, (name, metrics) in launches.items():
        if TIME not in metrics:
            raise ValueError(f"launch {identity} of {name} has no {TIME}")
        kernels.setdefault(name, Kernel(name)).add(metrics)
    return sorted(kernels.values(), key=lambda kernel: -kernel.nanoseconds)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # n/a: this device does not have the metric
        return None


def _scale(unit: str) -> float:
    """To nanoseconds and bytes, should ncu have chosen another unit."""
    scales = {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
    return {**scales, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}.get(unit, 1.0)


def describe(kernels: list[Kernel]) -> str:
    """The kernels in words."""
    total = sum(kernel.nanoseconds for kernel in kernels)
    lines = []
    for kernel in kernels:
        share = kernel.nanoseconds / total if total else 0.0
        lines.append(f"{kernel.name}")
        rate = ""
        if kernel.bytes_moved is not None and kernel.nanoseconds:
            rate = f", {kernel.bytes_moved / kernel.nanoseconds:.0f} GB/s of device memory"
        tensor = kernel.mean(next(iter(UNITS)))
        matrix = "" if tensor is None else f", matrix instructions {tensor:.0f} % of the time"
        lines.append(
            f"    {kernel.launches} launch(es), {kernel.nanoseconds / 1e6:.3f} ms ({share:.0%} of all){rate}{matrix}"
        )
        lines.append(f"    {kernel.limiter()}")
    return "\n".join(lines)


def main() -> int:
    """Print the metrics to ask for, or what standard input says; 1 where it says nothing."""
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
        return 0
    try:
        kernels = parse(sys.stdin)
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 1
    if not kernels:
        print("profile: ncu saw no kernel", file=sys.stderr)
        return 1
    print(describe(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
