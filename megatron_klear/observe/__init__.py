"""What a person sees of a run: metrics, progress, timings, memory, the report.

Importing this package is cheap; matplotlib, rich and TensorBoard are loaded when something needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_klear.observe.examples import append_examples, read_examples
    from megatron_klear.observe.heartbeat import Heartbeat, note_failure, whereabouts
    from megatron_klear.observe.memory import MemoryReading, host_free_bytes, memory_metrics, read_memory, reset_peaks
    from megatron_klear.observe.metrics import Metrics, MetricsWriter, SilentMetrics, open_metrics, read_metrics
    from megatron_klear.observe.progress import Progress
    from megatron_klear.observe.ranges import nvtx_range
    from megatron_klear.observe.report import write_report
    from megatron_klear.observe.stall_watch import StallWatch
    from megatron_klear.observe.throughput import Phases
    from megatron_klear.observe.utilization import DeviceRates, utilization_metrics

__all__ = [
    "DeviceRates",
    "Heartbeat",
    "MemoryReading",
    "Metrics",
    "MetricsWriter",
    "Phases",
    "Progress",
    "SilentMetrics",
    "StallWatch",
    "append_examples",
    "host_free_bytes",
    "memory_metrics",
    "note_failure",
    "nvtx_range",
    "open_metrics",
    "read_examples",
    "read_memory",
    "read_metrics",
    "reset_peaks",
    "utilization_metrics",
    "whereabouts",
    "write_report",
]

_HOMES = {
    "examples": ("append_examples", "read_examples"),
    "heartbeat": ("Heartbeat", "note_failure", "whereabouts"),
    "memory": ("MemoryReading", "host_free_bytes", "memory_metrics", "read_memory", "reset_peaks"),
    "metrics": ("Metrics", "MetricsWriter", "SilentMetrics", "open_metrics", "read_metrics"),
    "progress": ("Progress",),
    "ranges": ("nvtx_range",),
    "report": ("write_report",),
    "stall_watch": ("StallWatch",),
    "throughput": ("Phases",),
    "utilization": ("DeviceRates", "utilization_metrics"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, found in _HOMES.items():
        if name in found:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
