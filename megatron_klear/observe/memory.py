"""Memory of this process and of what it runs on: peaks, and what is free and used now."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.observe.names import MEMORY_HOST_PEAK_BYTES, MEMORY_PEAK_BYTES
from megatron_klear.observe.ranges import cuda_in_use

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """Memory at one moment.

    Attributes:
        device_free_bytes: of this process's GPU, whoever asks for it; of the host without CUDA.
        device_used_bytes: of that GPU by all processes; by this process without CUDA.
        host_free_bytes: that could be had without swapping, within the limit of a container.
        host_used_bytes: resident, by this process.
    """

    device_free_bytes: int
    device_used_bytes: int
    host_free_bytes: int
    host_used_bytes: int


def read_memory() -> MemoryReading:
    """What is free and used now, on the host and on this process's GPU."""
    free, used = host_free_bytes(), _status_bytes("VmRSS:")
    device_free, device_used = free, used
    if cuda_in_use():
        device_free, device_total = sys.modules["torch"].cuda.mem_get_info()
        device_used = device_total - device_free
    return MemoryReading(
        device_free_bytes=device_free, device_used_bytes=device_used, host_free_bytes=free, host_used_bytes=used
    )


def host_free_bytes() -> int:
    """Host memory that could be had without swapping, in bytes; 0 where that cannot be told."""
    free = 0
    if _MEMORY.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    try:  # a container's limit; what it has cached in files can be dropped
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used + int(statistics.get("inactive_file", 0))))


def _status_bytes(field: str) -> int:
    """A size that the kernel tells of this process; 0 where it does not."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def host_peak_bytes() -> int:
    """Peak resident memory of this process in bytes, since it started or since `reset_peaks`."""
    # VmHWM belongs to this program alone; getrusage's figure starts at the parent's peak after vfork + exec.
    peak = _status_bytes("VmHWM:")
    if peak:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int | None:
    """Peak of the CUDA memory that tensors of this process held, in bytes; None where CUDA is not in use."""
    return int(sys.modules["torch"].cuda.max_memory_allocated()) if cuda_in_use() else None


def reset_peaks() -> None:
    """Starts the peaks again from what is in use now; the host's only where the kernel allows it."""
    if cuda_in_use():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def memory_metrics() -> dict[str, int]:
    """This process's peaks under the names of the metrics, in bytes."""
    host, device = host_peak_bytes(), device_peak_bytes()
    return {MEMORY_PEAK_BYTES: host if device is None else device, MEMORY_HOST_PEAK_BYTES: host}
