"""How many tokens a server's model has, as far as it can be known.

SGLang tells that over HTTP only when it refuses a request, and a server that is paused (as a publish that failed leaves
it) refuses none: requests wait until it goes on. It is not told to go on for this, as it would generate for others with
weights of which is not known which they are; the folder of its model tells, where that can be read from here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang.connection import Connection, Refused
from megatron_klear.rollout.sglang.model_folder import started_from

log = logging.getLogger(__name__)

_ASK_SECONDS = 10.0
_NOT_READY = 503
_NO_TOKEN = 10**9


async def vocab_size(connection: Connection, server: Mapping[str, Any], model: Mapping[str, Any]) -> int | None:
    """The size of a server's vocabulary; None, and a line in the log, where nothing tells it.

    Args:
        connection: to the server.
        server, model: its answers at /server_info and /model_info.
    """
    found = None if await _is_paused(connection) else await _as_refused(connection)
    if found is not None:
        return found
    config = started_from(server, model) / "config.json"
    try:
        override = json.loads(server.get("json_model_override_args") or "{}")
        return int({**json.loads(config.read_text(encoding="utf-8")), **override}["vocab_size"])
    except (OSError, ValueError, TypeError, KeyError):
        log.warning(
            "%s: nothing here tells how many tokens its model has: it takes no requests, and %s cannot be read; where "
            "it has others than model.vocab_size it will refuse the weights that are published",
            connection.name, config,
        )  # fmt: skip
        return None


async def _is_paused(connection: Connection) -> bool:
    try:
        return await connection.status("/ready", timeout_seconds=_ASK_SECONDS) == _NOT_READY
    except EndpointError:
        return False


async def _as_refused(connection: Connection) -> int | None:
    """What it says when it refuses a bias on a token that no vocabulary has, before anything is computed."""
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "logit_bias": {str(_NO_TOKEN): 0.0}}}
    try:
        await connection.post("/generate", body, timeout_seconds=_ASK_SECONDS)
    except Refused as refusal:
        found = re.search(r"\[0, (\d+)\]", refusal.text)
        return int(found[1]) + 1 if found else None
    except EndpointError:
        return None
    return None
