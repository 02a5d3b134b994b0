"""Floating-point operations per second of this device in matrix products, as measured here."""

from __future__ import annotations

import functools
import statistics
import time

import torch

_TARGET_SECONDS = {"cuda": 0.4, "cpu": 0.1}
_SIZES = {"cuda": 8192, "cpu": 384}
_REPEATS = 5


def device_name(device: torch.device) -> str:
    """What the device is, as in a table of results."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrix products on this device; measured once per process, in half a second.

    The median of several stretches, since single ones are disturbed by whatever else runs. It is what a model can hope
    for: data sheets tell the rate of an unthrottled chip.

    Args:
        device: where; processes that share a device or cores should measure at the same time, as they will compute.
        dtype: of the factors.
    """
    size = _SIZES[device.type]
    source = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay untouched
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=source) for _ in range(2))
    out = torch.empty_like(left)

    def stretch(count: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.matmul(left, right, out=out)
        _wait(device)
        return (time.perf_counter() - start) / count

    stretch(2)  # kernels are chosen and loaded at the first call
    count = max(1, round(_TARGET_SECONDS[device.type] / _REPEATS / max(stretch(1), 1e-9)))
    return 2.0 * size**3 / statistics.median(stretch(count) for _ in range(_REPEATS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
