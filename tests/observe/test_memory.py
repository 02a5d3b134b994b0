"""Peak memory, against psutil and an allocation of known size; ranges do nothing without CUDA."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from megatron_klear.observe.memory import device_peak_bytes, host_peak_bytes, memory_metrics
from megatron_klear.observe.ranges import nvtx_range


def test_the_peak_is_at_least_what_is_in_use() -> None:
    assert host_peak_bytes() >= 0.9 * psutil.Process().memory_info().rss


def test_the_peak_sees_memory_that_is_gone_again() -> None:
    program = (
        "from megatron_klear.observe.memory import host_peak_bytes\n"
        "before = host_peak_bytes()\n"
        "block = b'x' * (200 << 20)\n"
        "del block\n"
        "print(host_peak_bytes() - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert grown == pytest.approx(200 << 20, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_without_cuda_the_host_peak_is_the_peak() -> None:
    assert device_peak_bytes() is None
    found = memory_metrics()
    assert set(found) == {"memory/peak_bytes", "memory/host_peak_bytes"}
    assert found["memory/peak_bytes"] == found["memory/host_peak_bytes"] > 0


def test_ranges_let_values_and_exceptions_through() -> None:
    with nvtx_range("train"):
        value = 3
    assert value == 3
    with pytest.raises(ValueError, match="inside"), nvtx_range("train"):
        raise ValueError("inside")


def test_importing_the_room_loads_nothing_heavy() -> None:
    program = (
        "import sys, megatron_klear.observe\n"
        "print([name for name in ('torch', 'matplotlib', 'rich', 'tensorboard', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
