"""Rates of a step against their definition, worked out by hand, and the device's own rate."""

from __future__ import annotations

import pytest
import torch

from megatron_klear.observe import DeviceRates, names, utilization_metrics
from megatron_klear.observe.datasheets import datasheet_fp8_rate, datasheet_rate
from megatron_klear.observe.device_rate import device_name, product_rate
from megatron_klear.observe.flops import FlopCount

FLOPS = FlopCount(projections=6e12, attention=3e12, head=1e12)


def test_a_step_by_hand() -> None:
    seconds = {"generate": 100.0, "train": 4.0, "old logprobs": 0.75, "left out logprobs": 0.25, "publish": 7.0}
    rates = DeviceRates(count=4, measured=2e12, datasheet=4e12)
    found = utilization_metrics(FLOPS, seconds, rates)
    # 10 TFLOP in the 5 seconds in which the model was computed, on 4 devices: half a TFLOP/s each.
    assert found == {names.MODEL_TFLOPS: 0.5, names.MFU: 0.25, names.MFU_DATASHEET: 0.125, names.ATTENTION_SHARE: 0.3}


def test_what_is_not_known_is_not_claimed() -> None:
    rates = DeviceRates(count=1, measured=None, datasheet=None)
    assert names.MFU not in utilization_metrics(FLOPS, {"train": 1.0}, rates)
    assert names.MFU_DATASHEET not in utilization_metrics(FLOPS, {"train": 1.0}, rates)
    assert utilization_metrics(FlopCount(), {"train": 1.0}, rates) == {}
    assert utilization_metrics(FLOPS, {"generate": 1.0}, rates) == {}


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        # Dense rates, half of those that the sheets give with sparsity: 1,979, 1,513 and 1,671 TFLOPS.
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H800", 989.4e12),
        ("NVIDIA H800 PCIe", 756.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA B300 SXM6 AC", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),  # as old drivers have it
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L40S", 362.05e12),
    ],
)
def test_data_sheets(name: str, rate: float) -> None:
    assert datasheet_rate(name) == rate


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        # 3,958 TFLOPS with sparsity, which are 1,978.9 without; 72 PFLOPS with sparsity over eight.
        ("NVIDIA H100 80GB HBM3", 1978.9e12),
        ("NVIDIA H200", 1978.9e12),
        ("NVIDIA B200", 4.5e15),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA H200 NVL", None),
    ],
)
def test_data_sheets_of_fp8(name: str, rate: float | None) -> None:
    assert datasheet_fp8_rate(name) == rate


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A100X",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H200 Something New",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4090",
        "Intel(R) Xeon(R) Processor",
        "",
    ],
)
def test_a_name_that_only_contains_a_known_one_has_no_data_sheet(name: str) -> None:
    assert datasheet_rate(name) is None


def test_measuring_counts_two_operations_per_multiply_add_and_leaves_random_numbers_alone(monkeypatch) -> None:
    from megatron_klear.observe import device_rate

    clock, products = [0.0], []

    def product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        products.append((left.shape, right.shape, left.dtype))
        clock[0] += 0.002

    monkeypatch.setattr(device_rate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(device_rate.torch, "matmul", product)
    before = torch.get_rng_state()
    device_rate.product_rate.cache_clear()
    rate = product_rate(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    (rows, inner), (_, columns), dtype = products[0]
    assert rate == pytest.approx(2 * rows * inner * columns / 0.002)
    assert dtype == torch.bfloat16
    count = len(products)
    assert product_rate(torch.device("cpu"), torch.bfloat16) == rate
    assert len(products) == count, "a process measures once"
    device_rate.product_rate.cache_clear()


def test_the_real_device_does_something() -> None:
    assert 1e8 < product_rate(torch.device("cpu"), torch.float32) < 1e15
    assert "threads" in device_name(torch.device("cpu"))
