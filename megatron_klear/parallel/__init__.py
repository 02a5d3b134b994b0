"""Process groups, device placement, and the CPU stand-in for CUDA."""

from megatron_klear.parallel.all_ranks import AllRanks
from megatron_klear.parallel.context import reset_layout, start, stop
from megatron_klear.parallel.cpu_device import cuda_means_cpu
from megatron_klear.parallel.first_rank import FirstRank
from megatron_klear.parallel.machines import Machines, SilentMachine
from megatron_klear.parallel.orphans import end_with_parent

__all__ = [
    "AllRanks",
    "FirstRank",
    "Machines",
    "SilentMachine",
    "cuda_means_cpu",
    "end_with_parent",
    "reset_layout",
    "start",
    "stop",
]
