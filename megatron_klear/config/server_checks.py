"""Checks of what serves the rollouts: addresses, ports, and proofs of a publish that fit together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megatron_klear.config.server_arguments import own_arguments
from megatron_klear.config.server_url import is_server_url
from megatron_klear.config.serving import ENGINE_FREE_SECONDS

if TYPE_CHECKING:
    from megatron_klear.config.architecture import Architecture
    from megatron_klear.config.checks import Problems
    from megatron_klear.config.schema import Entry, Settings


def check_serving(
    settings: Settings, architecture: Architecture | None, problems: Problems, *, has_weights: bool
) -> None:
    """Check that SGLang can be started or reached, and that a publish can be proved as it is asked for.

    Args:
        settings: values that are valid one by one.
        architecture: of the model; None where that is not known.
        problems: gets what is found.
        has_weights: whether `model.hf_dir` is set, be it here or elsewhere.
    """
    sglang, verify = settings.sglang, settings.weight_sync.verify
    for url in sglang.urls:
        if not is_server_url(url):
            problems.add("sglang.urls", f"got {url!r}, must be http://HOST:PORT")
    for url in sorted({url for url in sglang.urls if sglang.urls.count(url) > 1}):
        problems.add("sglang.urls", f"{url} is named more than once")
    if sglang.router_url is not None:
        if not is_server_url(sglang.router_url):
            problems.add("sglang.router_url", f"got {sglang.router_url!r}, must be http://HOST:PORT")
        if not sglang.urls:
            text = f"got {sglang.router_url} without sglang.urls; name the servers behind the router, which get weights"
            problems.add("sglang.router_url", text, "sglang.urls")
        if settings.scheduling.min_engines > 1:
            text = f"got {settings.scheduling.min_engines}, and servers behind sglang.router_url count as one: set 1"
            problems.add("scheduling.min_engines", text, "sglang.router_url")
    if sglang.restart_requests is not None and not sglang.urls:
        text = f"got {sglang.restart_requests} without sglang.urls; servers of ours are restarted without being asked"
        problems.add("sglang.restart_requests", text, "sglang.urls")
    if sglang.connect_seconds and not sglang.urls:
        text = f"got {sglang.connect_seconds:g} without sglang.urls; servers of ours have sglang.start_seconds"
        problems.add("sglang.connect_seconds", text, "sglang.urls")
    if not sglang.urls:
        if architecture is not None:
            problems.divides(
                "model.num_attention_heads", architecture.num_attention_heads, sglang.server_tp, "sglang.server_tp"
            )
        last = (sglang.port or 1) + sglang.servers - 1
        if last > 65535:
            problems.add("sglang.port", f"got {sglang.port}; {sglang.servers} servers need ports up to {last}")
        for argument, instead in own_arguments(sglang.extra_args):
            problems.add("sglang.extra_args", f"got {argument}, which the program gives each server itself; {instead}")
    if sglang.quantization != "none" and verify == "checksum":
        problems.add(
            "weight_sync.verify",
            f"got checksum, but with sglang.quantization = {sglang.quantization} an engine's weights are no longer the "
            "trainer's; set logprobs or checksum_or_logprobs",
            "sglang.quantization",
        )
    if sglang.quantization != "none" and not sglang.urls and not has_weights:
        text = f"got {sglang.quantization}, and servers that quantise start from weights of the model: set model.hf_dir"
        problems.add("sglang.quantization", text, "model.hf_dir")
    pause = settings.weight_sync.pause_mode
    if pause != "abort" and (verify == "logprobs" or sglang.quantization != "none"):
        problems.add(
            "weight_sync.pause_mode",
            f"got {pause}, and log-probabilities (weight_sync.verify) prove new weights only once engines generate: "
            "responses that they hold would go on before that; set abort",
            "weight_sync.verify",
        )
    longest, limit = settings.weight_sync.timeout_seconds, settings.parallel.timeout_seconds
    if longest + 2 * min(longest, ENGINE_FREE_SECONDS) >= limit:
        text = (
            f"got {longest:g}; an engine that hangs is given up after that and up to twice {ENGINE_FREE_SECONDS:g} s, "
            f"while other ranks wait in an exchange, which must end before parallel.timeout_seconds = {limit:g}"
        )
        problems.add("weight_sync.timeout_seconds", text, "parallel.timeout_seconds")
    if sglang.quantization == "fp8" and settings.run.device == "cpu":
        problems.add("sglang.quantization", "got fp8, which needs a GPU, and run.device is cpu")


def check_least(
    settings: Settings, entry: Entry, world_size: int, problems: Problems, *, ranks_per_machine: int | None = None
) -> None:
    """Check that there are as many engines as the rollout manager, where it runs, must have left.

    Args:
        settings: values that are valid one by one; `rollout.engine` is sglang.
        entry: which entry is to run.
        world_size: number of ranks.
        problems: gets what is found.
        ranks_per_machine: None for what torchrun says of this one.
    """
    sglang, least = settings.sglang, settings.scheduling.min_engines
    if not settings.generates(entry) or settings.scheduling.rollout_only or sglang.router_url is not None:
        return
    count, found = len(sglang.urls), "sglang.urls"
    if not sglang.urls:
        count = sglang.servers * _most_machines(world_size, ranks_per_machine)
        found = f"sglang.servers = {sglang.servers} on each machine"
    if least > count:
        text = f"got {least} of {count} engines ({found}); set at most {count}"
        involved = ("sglang.urls", "sglang.servers", "scheduling.rollout_only", "scheduling.replay_from")
        problems.add("scheduling.min_engines", text, "sglang.router_url", *involved)


def _most_machines(world_size: int, ranks_per_machine: int | None) -> int:
    """As torchrun tells; without it each rank may be on one of its own."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = ranks_per_machine or (int(here) if here.isdecimal() else 1)
    return -(-world_size // max(1, ranks))
