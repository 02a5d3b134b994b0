"""What this run's devices can do: measured once at its start, on all ranks at the same time."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_klear.checkpoint.collective import agree, together
from megatron_klear.observe import DeviceRates
from megatron_klear.observe.datasheets import datasheet_rate
from megatron_klear.observe.device_rate import device_name, product_rate
from megatron_klear.observe.replace import replace_file
from megatron_klear.records import ParallelContext

log = logging.getLogger(__name__)

RATE_FILE = "device_rate.json"


def device_rates(root: Path, context: ParallelContext, dtype: torch.dtype) -> DeviceRates:
    """Rates of the run's devices (a collective).

    The measurement is kept in the run directory, so that the shares of a resumed run are of the same rate, as long as
    it goes on with the same kind and number of devices.

    Args:
        root: the run directory.
        context: the layout.
        dtype: of the model's matrix products.
    """
    name = device_name(context.device)
    key = {"device": name, "dtype": str(dtype), "processes": context.world.size, "torch": torch.__version__}
    measured = agree("read the device's rate", partial(_kept, root / RATE_FILE, key), context)
    if measured is None:
        total = torch.tensor([product_rate(context.device, dtype)], dtype=torch.float64, device=context.device)
        dist.all_reduce(total)
        measured = float(total) / context.world.size
        text = json.dumps({**key, "flops_per_second": measured}, indent=1) + "\n"
        together("keep the device's rate", partial(replace_file, root / RATE_FILE, text), context, only_first=True)
    rates = DeviceRates(count=context.world.size, measured=measured, datasheet=datasheet_rate(name))
    if context.world.rank == 0:
        sheet = "" if rates.datasheet is None else f"; data sheet {rates.datasheet / 1e12:.0f} (bfloat16)"
        kind = str(dtype).removeprefix("torch.")
        log.info("%s: %.3g TFLOP/s measured in %s products on each%s", name, measured / 1e12, kind, sheet)
    return rates


def _kept(file: Path, key: dict[str, Any]) -> float | None:
    """The rate that was measured before on the same devices."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        rate = float(kept.pop("flops_per_second"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rate if kept == key and rate > 0 else None
