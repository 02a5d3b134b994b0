"""Starts the process groups and says where this process stands in the layout.

The only module that calls `megatron.core.parallel_state`; everything else receives a `ParallelContext`.
"""

from __future__ import annotations

import datetime
import logging
import os

import torch
import torch.distributed as dist

from megatron_klear.config import ParallelSettings
from megatron_klear.errors import ConfigError
from megatron_klear.parallel import cpu_device
from megatron_klear.records import ParallelAxis, ParallelContext

log = logging.getLogger(__name__)


def start(parallel: ParallelSettings, *, device: str = "auto", seed: int = 0) -> ParallelContext:
    """Join the other processes of the launch and build Megatron's process groups.

    Ranks are laid out as Megatron does by default, fastest first: tensor, context, data, pipeline.
    Reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK` as torchrun sets them; without them this is a run of one process.

    Args:
        parallel: sizes of the layout and `timeout_seconds`, after which a collective that waits for a
            missing process fails and names the operation.
        device: `auto`, `cpu` or `cuda`.
        seed: of Megatron's random-state tracker (weights are initialised from it).

    Raises:
        ConfigError: `device` is `cuda` and there is none, or the layout does not divide the world.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    shards = parallel.tp * parallel.pp * parallel.cp
    if world_size % shards:
        raise ConfigError([f"parallel: tp * pp * cp = {shards} does not divide the {world_size} launched processes"])
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        cpu_device.install()
    if not dist.is_initialized():
        _init_process_group(chosen, world_size, parallel.timeout_seconds)
    return _build_groups(parallel, chosen, seed)


def _choose_device(device: str) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["run.device: cuda was asked for but no CUDA device is there; use auto or cpu"])
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            ["run.device: cpu cannot be forced where CUDA is present, since Megatron-Core would use the GPU anyway; "
             "hide the GPUs with CUDA_VISIBLE_DEVICES= instead"]
        )  # fmt: skip
    if torch.cuda.is_available():
        # The same answer on all processes of a node, of which only the first tells it.
        local_size = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                [f"run: {local_size} processes were started on this node, which has {torch.cuda.device_count()} GPUs; "
                 "launch with --nproc-per-node equal to the number of GPUs"]
            )  # fmt: skip
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _init_process_group(device: torch.device, world_size: int, timeout_seconds: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def _build_groups(parallel: ParallelSettings, device: torch.device, seed: int) -> ParallelContext:
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            context_parallel_size=parallel.cp,
            distributed_timeout_minutes=max(1, round(parallel.timeout_seconds / 60)),
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelContext(
        world=_axis(dist.group.WORLD),
        tp=_axis(parallel_state.get_tensor_model_parallel_group()),
        cp=_axis(parallel_state.get_context_parallel_group()),
        pp=_axis(parallel_state.get_pipeline_model_parallel_group()),
        dp=_axis(parallel_state.get_data_parallel_group()),
        dp_cp=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        device=device,
    )


def _axis(group: dist.ProcessGroup | None) -> ParallelAxis:
    assert group is not None
    return ParallelAxis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)


def reset_layout() -> None:
    """Leave the layout but stay with the other processes, so that `start` can build another one (a collective).

    What was built on the old layout must no longer be used.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    dist.barrier()  # nobody still reads what another rank sent it
    # Megatron forgets most of its groups without ending them: every layout would leave some fifty threads behind.
    for group in reversed(parallel_state._global_process_group_list or ()):
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave the process groups; safe to call twice or when nothing was started."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
