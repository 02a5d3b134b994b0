"""Peak memory, against psutil and an allocation of known size; ranges do nothing without CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from megatron_klear.observe import memory
from megatron_klear.observe.memory import device_peak_bytes, host_peak_bytes, memory_metrics, read_memory
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


def test_what_is_free_and_used_now_agrees_with_psutil(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    found, seen = read_memory(), psutil.virtual_memory()
    assert found.host_used_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert found.host_free_bytes == pytest.approx(seen.available, abs=0.1 * seen.total)
    if not torch.cuda.is_available():
        assert (found.device_free_bytes, found.device_used_bytes) == (found.host_free_bytes, found.host_used_bytes)
    for name, text in {"max": "5000000", "current": "3000000", "stat": "anon 7\ninactive_file 1000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.host_free_bytes() == 2_001_000, "a container's limit"
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_free_bytes() > 2_001_000


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
