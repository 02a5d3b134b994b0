"""Peak memory of this process, on the host and on its GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_klear.observe.names import MEMORY_HOST_PEAK_BYTES, MEMORY_PEAK_BYTES
from megatron_klear.observe.ranges import cuda_in_use

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def host_peak_bytes() -> int:
    """Peak resident memory of this process in bytes, since it started or since `reset_peaks`."""
    # VmHWM belongs to this program alone; getrusage's figure starts at the parent's peak after vfork + exec.
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
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
