"""Rates of a step against their definition, worked out by hand, and the device's own rate."""

from __future__ import annotations

import pytest
import torch

from megatron_klear.observe import DeviceRates, names, utilization_metrics
from megatron_klear.observe.device_rate import datasheet_rate, device_name, product_rate
from megatron_klear.observe.flops import FlopCount

FLOPS = FlopCount(projections=6e12, attention=3e12, head=1e12)


def test_a_step_by_hand() -> None:
    seconds = {"generate": 100.0, "train": 4.0, "old logprobs": 1.0, "publish": 7.0}
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
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_data_sheets(name: str, rate: float | None) -> None:
    assert datasheet_rate(name) == rate


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
