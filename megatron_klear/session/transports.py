"""The choice of how weights reach engines: by placement, unless `weight_sync.transport` says it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import torch

from megatron_klear.session.server_start import served_config
from megatron_klear.session.session import Session
from megatron_klear.weight_sync import (
    BucketSharing,
    DiskTransport,
    DistributedTransport,
    EngineCaller,
    EngineGroup,
    EngineLayout,
    KeepingTransport,
    SharedTransport,
    TensorTransport,
    Transport,
    WeightFiles,
    lack_of_shared_memory,
)

log = logging.getLogger(__name__)


def choose_transport(
    session: Session,
    engines: EngineGroup,
    layout: EngineLayout,
    *,
    are_ours: bool,
    urls: Sequence[str],
    sharing: BucketSharing | None = None,
    ranks_of: Callable[[EngineCaller], range] = lambda caller: range(0),
) -> tuple[Transport, WeightFiles | None]:
    """The transport, and where the weights of the last publish are kept for engines that are started anew.

    Args:
        session: the run.
        engines: that get the weights.
        urls: of all servers, also of those that do not answer yet: the transport is the same to the end.
        layout: how they hold them.
        are_ours: whether we started them: a broadcast's group may be kept, as nobody else ends them unseen.
        sharing: every rank offers its weights to the engine on its GPU.
        ranks_of: with `sharing`: the trainer's ranks on the GPUs of an engine.

    Returns:
        The second is None where nothing is kept (`weight_sync.keep_on_disk`, or behind a router).
    """
    settings = session.settings
    kind = settings.weight_sync.transport
    near = all(_is_this_machine(url) for url in urls)
    if kind == "auto":
        kind = "tensor" if near or settings.sglang.placement == "colocated" else "distributed"
    keeps = settings.weight_sync.keep_on_disk and settings.sglang.router_url is None
    files = WeightFiles(session.root / "weights", served_config(session, layout.dtype), keep=2 if kind == "disk" else 1)
    if kind == "disk":
        return DiskTransport(engines, files), files if keeps else None
    made: Transport
    if sharing is not None:
        made = SharedTransport(engines, sharing, ranks_of)
    elif kind == "distributed":
        device = torch.device(layout.device)
        made = DistributedTransport(engines, tp=layout.tp, device=device, keep_group=are_ours)
    else:
        bucket_bytes = settings.weight_sync.bucket_bytes
        lack = lack_of_shared_memory(session.arch, dtype=layout.dtype, bucket_bytes=bucket_bytes)
        if near and lack:
            log.info("weights go to the engines in requests, which is slow: %s (weight_sync.bucket_bytes)", lack)
        made = TensorTransport(engines, tp=layout.tp, by_value=not near or bool(lack))
    return (KeepingTransport(made, files), files) if keeps else (made, None)


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())
