"""How much of the devices a step used: model operations per second, and their share of what the devices can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_klear.observe import names
from megatron_klear.observe.flops import FlopCount

MODEL_PHASES = ("train", "old logprobs", "left out logprobs")
"""The phases in which the trainer computes the model; operations are counted there, so rates are taken over these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """What the devices of a run can do, in floating-point operations per second of one of them.

    Attributes:
        count: devices, or processes where several share a CPU.
        measured: in matrix products of the model's data type, mean over the devices; None if it was not measured.
        datasheet: in bfloat16 by the data sheet; None where that is not known.
    """

    count: int
    measured: float | None
    datasheet: float | None


def utilization_metrics(flops: FlopCount, seconds: Mapping[str, float], rates: DeviceRates) -> dict[str, float]:
    """Model operations per second of a device under the names of the metrics, and the shares that they are.

    Args:
        flops: operations that the model needed in the step, over all ranks.
        seconds: seconds of the step by phase.
        rates: what the devices can do.

    Returns:
        Nothing when the step computed no model.
    """
    busy = sum(seconds.get(name, 0.0) for name in MODEL_PHASES)
    if busy <= 0 or flops.total <= 0:
        return {}
    rate = flops.total / busy / rates.count
    values = {names.MODEL_TFLOPS: rate / 1e12}
    if rates.measured is not None:
        values[names.MFU] = rate / rates.measured
    if rates.datasheet is not None:
        values[names.MFU_DATASHEET] = rate / rates.datasheet
    values[names.ATTENTION_SHARE] = flops.attention / flops.total
    return values
