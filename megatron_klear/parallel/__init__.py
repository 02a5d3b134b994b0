"""Process groups, device placement, and the CPU stand-in for CUDA."""

from megatron_klear.parallel.context import reset_layout, start, stop
from megatron_klear.parallel.cpu_device import cuda_means_cpu
from megatron_klear.parallel.first_rank import FirstRank
from megatron_klear.parallel.machines import Machines

__all__ = ["FirstRank", "Machines", "cuda_means_cpu", "reset_layout", "start", "stop"]
