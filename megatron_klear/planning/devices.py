"""Accelerators that plans are made for: rates, memory and links as their data sheets give them, none measured here.

Rates of products are those that runs are judged by (`observe/datasheets.py`). Links are one direction of one device.
Networks are the ones of NVIDIA's own 8-GPU systems, one adapter per GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klear.observe.datasheets import datasheet_fp8_rate, datasheet_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator and what connects it to others.

    Attributes:
        title: as people call it.
        flops: bfloat16 products with float32 sums, per second.
        fp8_flops: the same in FP8; None where there are none.
        fp8_transposes: whether products in FP8 read both operands along their rows only, so that what is multiplied
            along its columns must be there transposed: so Hopper, while Blackwell reads either way (Transformer Engine
            2.14.1, `is_non_tn_fp8_gemm_supported`: compute capability 10.x, not 9.x).
        memory_bytes: on the device; None where it is not judged.
        memory_rate: bytes per second between memory and processors.
        link_rate: bytes per second to a device of the same node.
        network_rate: bytes per second to a device of another node.
        per_node: devices of a node.
        source: where the figures stand.
    """

    title: str
    flops: float
    fp8_flops: float | None
    fp8_transposes: bool
    memory_bytes: float | None
    memory_rate: float
    link_rate: float
    network_rate: float
    per_node: int
    source: str


def _sheet(driver_name: str) -> float:
    rate = datasheet_rate(driver_name)
    assert rate is not None, f"{driver_name} has no data sheet in observe/datasheets.py"
    return rate


DEVICES: dict[str, Device] = {
    "h100": Device(
        title="H100 SXM 80 GB",
        flops=_sheet("H100 80GB HBM3"),
        fp8_flops=datasheet_fp8_rate("H100 80GB HBM3"),
        fp8_transposes=True,
        memory_bytes=80e9,
        memory_rate=3.35e12,
        link_rate=450e9,  # NVLink 4: 900 GB/s in both directions
        network_rate=50e9,  # 400 Gb/s
        per_node=8,
        source="NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet",
    ),
    "h200": Device(
        title="H200 SXM 141 GB",
        flops=_sheet("H200"),
        fp8_flops=datasheet_fp8_rate("H200"),
        fp8_transposes=True,
        memory_bytes=141e9,
        memory_rate=4.8e12,
        link_rate=450e9,
        network_rate=50e9,
        per_node=8,
        source="NVIDIA H200 Tensor Core GPU data sheet; DGX H200 data sheet",
    ),
    "b200": Device(
        title="B200 SXM 180 GB",
        flops=_sheet("B200"),
        fp8_flops=datasheet_fp8_rate("B200"),
        fp8_transposes=False,
        memory_bytes=180e9,  # a DGX B200's 1,440 GB over 8
        memory_rate=8.0e12,
        link_rate=900e9,  # NVLink 5: 1.8 TB/s in both directions
        network_rate=50e9,
        per_node=8,
        source="NVIDIA DGX B200 data sheet",
    ),
    "a100": Device(
        title="A100 SXM 80 GB",
        flops=_sheet("A100-SXM4-80GB"),
        fp8_flops=datasheet_fp8_rate("A100-SXM4-80GB"),
        fp8_transposes=False,
        memory_bytes=80e9,
        memory_rate=2.039e12,
        link_rate=300e9,  # NVLink 3: 600 GB/s in both directions
        network_rate=25e9,  # 200 Gb/s
        per_node=8,
        source="NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet",
    ),
    "cpu": Device(
        title="one CPU core",
        flops=50e9,
        fp8_flops=None,
        fp8_transposes=False,
        memory_bytes=None,
        memory_rate=10e9,
        link_rate=2e9,
        network_rate=1e9,
        per_node=8,
        source="a guess for one thread of a server's processor; memory is not judged",
    ),
}
