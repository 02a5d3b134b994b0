"""The rate of the devices is measured once per run and kept, as long as the devices are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_klear import parallel
from megatron_klear.config import ParallelSettings
from megatron_klear.session import device_rates as module
from megatron_klear.session.device_rates import RATE_FILE, device_rates


@pytest.fixture
def context():
    yield parallel.start(ParallelSettings())
    parallel.stop()


def test_kept_for_a_resume_and_measured_anew_elsewhere(
    tmp_path: Path, context, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter((1e12, 2e12, 3e12, 4e12))
    monkeypatch.setattr(module, "product_rate", lambda device, dtype: next(rates))
    first = device_rates(tmp_path, context, torch.float32)
    assert (first.count, first.measured, first.datasheet) == (1, 1e12, None)
    assert device_rates(tmp_path, context, torch.float32).measured == 1e12
    assert device_rates(tmp_path, context, torch.bfloat16).measured == 2e12, "another data type"
    kept = json.loads((tmp_path / RATE_FILE).read_text())
    assert kept["processes"] == 1
    (tmp_path / RATE_FILE).write_text(json.dumps({**kept, "processes": 8}))
    assert device_rates(tmp_path, context, torch.bfloat16).measured == 3e12, "another number of devices"
    for broken in ("{", "[]", json.dumps({**kept, "flops_per_second": None})):
        (tmp_path / RATE_FILE).write_text(broken)
    assert device_rates(tmp_path, context, torch.bfloat16).measured == 4e12
