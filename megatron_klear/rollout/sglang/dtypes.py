"""In which data type a server holds its weights: SGLang tells what was asked for, which may be `auto`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_klear.rollout.sglang.model_folder import started_from

_ALIASES = {"half": "float16", "float": "float32"}


def served_dtype(server: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The data type of a server's weights, as torch names it; `auto` where nothing here tells.

    `--dtype auto` is the type in the model's config.json, and float16 for one of float32 or of none (SGLang 0.5.23,
    `configs/model_config.py`).

    Args:
        server, model: its answers at /server_info and /model_info.
    """
    asked = str(server.get("dtype", "auto")).lower()
    if asked != "auto":
        return _ALIASES.get(asked, asked)
    try:
        config = json.loads((started_from(server, model) / "config.json").read_text())
        config |= json.loads(server.get("json_model_override_args") or "{}")
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "auto"
    stored = _ALIASES.get(stored, stored)
    return "float16" if stored == "float32" else stored
