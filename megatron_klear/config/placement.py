"""Checks of servers that take turns with the trainer on its GPUs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_klear.config.checks import Problems
    from megatron_klear.config.schema import Entry, Settings


def check_placement(
    settings: Settings, entry: Entry, world_size: int, problems: Problems, *, ranks_per_machine: int | None = None
) -> None:
    """Refuse what cannot be where `sglang.placement` is colocated; of weights that give way, where it is not.

    Args:
        settings: values that are valid one by one; `rollout.engine` is sglang.
        entry: which entry is to run.
        world_size: number of ranks.
        problems: gets what is found.
        ranks_per_machine: None for what torchrun says of this one.
    """
    sglang, placement = settings.sglang, "sglang.placement"
    if sglang.placement == "separate":
        if sglang.offload_weights:
            problems.add(
                "sglang.offload_weights",
                "got true, and sglang.placement is separate: no server needs the trainer's memory; set colocated",
                placement,
            )
        return
    if entry == "rl" and settings.scheduling.mode != "sync":
        problems.add(
            "scheduling.mode",
            f"got {settings.scheduling.mode}, and sglang.placement is colocated: servers have no memory while the "
            "trainer trains, so that nothing can be generated meanwhile; set sync, or separate",
            placement,
        )
    if sglang.urls:
        problems.add(
            "sglang.urls",
            "names servers, and sglang.placement is colocated, which starts its own on the trainer's GPUs; leave it "
            "empty, or set separate",
            placement,
        )
    if sglang.first_gpu:
        problems.add(
            "sglang.first_gpu",
            f"got {sglang.first_gpu}, and sglang.placement is colocated: a machine's server i takes the GPUs of its "
            "ranks from i * sglang.server_tp on; leave it 0",
            placement,
        )
    if settings.weight_sync.transport == "distributed":
        problems.add(
            "weight_sync.transport",
            "got distributed, and sglang.placement is colocated: NCCL takes no two processes on one GPU into a group; "
            "set auto, tensor or disk",
            placement,
        )
    if sglang.offload_weights and settings.weight_sync.verify != "checksum":
        problems.add(
            "weight_sync.verify",
            f"got {settings.weight_sync.verify}, and sglang.offload_weights is true: to compare log-probabilities both "
            "sides would need their weights and the KV cache at once; set checksum, or offload_weights=false",
            "sglang.offload_weights",
        )
    _check_ranks(settings, ranks_per_machine or _ranks_here(world_size), problems)


def _check_ranks(settings: Settings, ranks: int, problems: Problems) -> None:
    """Check that every GPU of a machine's servers is one of the ranks' there."""
    sglang, placement = settings.sglang, "sglang.placement"
    gpus = sglang.servers * sglang.server_tp
    if gpus > ranks:
        problems.add(
            "sglang.servers",
            f"got {sglang.servers} of sglang.server_tp = {sglang.server_tp}, which need {gpus} GPUs of a machine, and "
            f"sglang.placement is colocated with {ranks} ranks on it; set at most {ranks // sglang.server_tp}",
            "sglang.server_tp",
            placement,
        )


def _ranks_here(world_size: int) -> int:
    """Ranks on this machine, as torchrun tells; without it all may be."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(here), world_size) if here.isdecimal() else world_size
