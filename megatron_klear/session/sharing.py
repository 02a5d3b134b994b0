"""The choice of how weights reach engines on the trainer's own GPUs."""

from __future__ import annotations

import logging

import torch.distributed as dist

from megatron_klear.parallel import Machines
from megatron_klear.session.session import Session
from megatron_klear.weight_sync import BucketSharing, EngineLayout, lack_of_shared_memory, why_not_shared

log = logging.getLogger(__name__)


def choose_sharing(session: Session, machines: Machines, layout: EngineLayout) -> BucketSharing | None:
    """Have every rank offer its weights to the engine on its GPU; None, and a line in the log, where it cannot.

    Args:
        session: the run.
        machines: the first rank of each tries it for all there (a collective).
        layout: how the engines hold weights.
    """
    settings, context = session.settings.weight_sync, session.context

    def why_not() -> str:
        if settings.transport == "disk":
            return "weight_sync.transport is disk"
        if layout.device == "cuda":
            return why_not_shared(context.device)
        return lack_of_shared_memory(
            session.arch, dtype=layout.dtype, bucket_bytes=settings.bucket_bytes, ranks=len(machines.pids)
        )

    told: list[str | None] = [None] * context.world.size
    dist.all_gather_object(told, why_not() if machines.is_leader else "")
    leaders = zip(machines.host_names, machines.ranks, strict=True)
    failed = [f"{host}: {told[ranks[0]]}" for host, ranks in leaders if told[ranks[0]]]
    if failed and session.is_first:
        log.info("weights do not go to the engines by handles of each rank's memory: %s", "; ".join(failed))
    return None if failed else BucketSharing(context)
