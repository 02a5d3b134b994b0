"""Whether a running server can take the weights that are published, and show that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_klear.config.server_options import ONLINE_FP8


def update_problems(server: Mapping[str, Any], verify: str) -> list[str]:
    """What keeps a server from being published to.

    Args:
        server: its answer at /server_info.
        verify: setting `weight_sync.verify`.
    """
    problems = []
    for name in ("dp_size", "pp_size"):
        if int(server.get(name) or 1) != 1:
            problems.append(
                f"it has {name} {server[name]}, and weights are sent to one tensor parallel group; start it without "
                f"--{name.replace('_', '-')}, and more servers instead"
            )
    quantization = server.get("quantization")
    if quantization and server.get("load_format") != ONLINE_FP8:
        problems.append(
            f"it quantises its weights ({quantization}) and cannot be sent others; start it with --load-format "
            f"{ONLINE_FP8}, from a directory with weights"
        )
    if quantization and verify == "checksum":
        problems.append(
            f"its weights are quantised ({quantization}) and no longer the trainer's, and weight_sync.verify is "
            "checksum; set logprobs or checksum_or_logprobs"
        )
    return problems
