"""Floating-point operations per second of devices in matrix products by their data sheets; no torch.

Names are whole, since "H200 NVL" is no H200 and "A10G" no A10. A device that is not listed, or a slice of one (MIG),
has no data sheet here: what is measured on it stands alone. Where a sheet has only the rate with sparsity, it is
halved.
"""

from __future__ import annotations

_SHEETS: dict[float, tuple[str, ...]] = {
    # H100 and H800 data sheets, column SXM; H200, column SXM; GH200 Grace Hopper Superchip: 1,979 TFLOPS with sparsity.
    989.4e12: ("H100 80GB HBM3", "H800", "H200", "GH200 480GB", "GH200 120GB", "GH200 144G HBM3e"),
    # H100 PCIe and H800 PCIe data sheets: 1,513 with sparsity.
    756.5e12: ("H100 PCIe", "H800 PCIe"),
    # H100 and H200 data sheets, column NVL: 1,671 with sparsity.
    835.5e12: ("H100 NVL", "H200 NVL"),
    # HGX B200 and HGX B300 data sheets: 36 PFLOPS with sparsity by eight GPUs.
    2.25e15: ("B200", "B300 SXM6 AC"),
    # GB200 NVL72 and GB300 NVL72 data sheets: 360 PFLOPS with sparsity by 72 GPUs.
    2.5e15: ("GB200", "GB300"),
    # A100 and A800 data sheets: 312 without sparsity, in every form.
    312e12: (
        "A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100-PCIE-80GB", "A100 80GB PCIe",
        "A800-SXM4-80GB", "A800 80GB PCIe",
    ),
    362.05e12: ("L40S",),  # L40S data sheet: 362.05 without sparsity
    181.05e12: ("L40",),  # L40 data sheet: 181.05 without sparsity
    121e12: ("L4",),  # L4 data sheet: 242 with sparsity
    149.7e12: ("A40",),  # A40 data sheet: 149.7 without sparsity
    125e12: ("A10",),  # A10 data sheet: 125 without sparsity
}  # fmt: skip
"""Dense bfloat16 operations per second in NVIDIA's data sheets, by whole device names without "NVIDIA"."""

_FP8_SHEETS: dict[float, tuple[str, ...]] = {
    # H100 and H200 data sheets, column SXM: 3,958 TFLOPS with sparsity; the H100 white paper has 1,978.9 without.
    1978.9e12: ("H100 80GB HBM3", "H200"),
    4.5e15: ("B200",),  # HGX B200 data sheet: 72 PFLOPS with sparsity by eight GPUs
}
"""The same for FP8, of devices that runs are planned for."""

_DATASHEET_BF16 = {name: rate for rate, names in _SHEETS.items() for name in names}
_DATASHEET_FP8 = {name: rate for rate, names in _FP8_SHEETS.items() for name in names}


def datasheet_rate(device_name: str) -> float | None:
    """Dense bfloat16 operations per second by the data sheet; None for a device that is not known here.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it; old drivers leave out "NVIDIA".
    """
    return _DATASHEET_BF16.get(_whole_name(device_name))


def datasheet_fp8_rate(device_name: str) -> float | None:
    """Dense FP8 operations per second by the data sheet; None where there are none, or where they are not known here.

    Args:
        device_name: as in `datasheet_rate`.
    """
    return _DATASHEET_FP8.get(_whole_name(device_name))


def _whole_name(device_name: str) -> str:
    return device_name.strip().removeprefix("NVIDIA ")
