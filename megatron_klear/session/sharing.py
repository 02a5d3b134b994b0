"""The choice of how weights reach engines on the trainer's own GPUs."""

from __future__ import annotations

import logging

from megatron_klear.parallel import FirstRank
from megatron_klear.session.session import Session
from megatron_klear.weight_sync import BucketSharing, EngineLayout, shared_memory_bytes, why_not_shared

log = logging.getLogger(__name__)

_BUCKETS = 3
"""Buckets that a rank may have in shared memory at a time, with some room."""


def choose_sharing(session: Session, first_rank: FirstRank, layout: EngineLayout) -> BucketSharing | None:
    """Have every rank offer its weights to the engine on its GPU; None, and a line in the log, where it cannot.

    Args:
        session: the run.
        first_rank: tries it for all (a collective).
        layout: how the engines hold weights.
    """
    settings, context = session.settings.weight_sync, session.context

    def why_not() -> str:
        if settings.transport == "disk":
            return "weight_sync.transport is disk"
        if layout.device == "cuda":
            return why_not_shared(context.device)
        needed = _BUCKETS * settings.bucket_bytes * context.world.size
        free = shared_memory_bytes()
        return "" if free > needed else f"shared memory has {free} bytes free, {needed} are needed"

    reason = first_rank.run("see how weights can be shared", why_not)
    if reason and session.is_first:
        log.info("weights do not go to the engines by handles of each rank's memory: %s", reason)
    return None if reason else BucketSharing(context)
