"""Whether a server's model has the sizes of ours, as far as it can be known.

SGLang ends when it is sent tensors of other shapes than its own, and takes a part of a tensor that is longer for all of
it where it reads files. It tells no sizes over HTTP. It tells the folder that it was started from and what was laid
over its config.json (`--json-model-override-args`), so the sizes are known where that folder can be read from here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from megatron_klear.config.architecture import HF_KEYS, SHAPE_FIELDS
from megatron_klear.rollout.sglang.model_folder import started_from

log = logging.getLogger(__name__)

_SETTINGS = {HF_KEYS[name]: f"model.{name}" for name in SHAPE_FIELDS if name != "vocab_size"}
"""Our setting by key of config.json; the vocabulary is known more often, and compared by itself."""

QWEN3_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""What transformers' Qwen3Config, with which SGLang reads config.json, takes for keys that are not there."""


def sizes_problem(
    name: str, server: Mapping[str, Any], model: Mapping[str, Any], ours: Mapping[str, Any]
) -> str | None:
    """What is wrong with the sizes of a server's model; a line in the log where they cannot be read.

    Args:
        name: of the server, for the log.
        server, model: its answers at /server_info and /model_info.
        ours: config.json of the model that it must have the sizes of.
    """
    path = started_from(server, model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        override = json.loads(server.get("json_model_override_args") or "{}")
        theirs = _sizes({**config, **override})
    except (OSError, ValueError, TypeError):
        log.warning(
            "%s: nothing here tells the sizes of its model: %s cannot be read; where they are not ours (model.*), the "
            "first weights that are published end the server",
            name, path,
        )  # fmt: skip
        return None
    wanted = _sizes(ours)
    others = [
        f"{key} {_shown(theirs[key])}, ours {_shown(wanted[key])} ({setting})"
        for key, setting in _SETTINGS.items()
        if theirs[key] != wanted[key]
    ]
    if not others:
        return None
    return (
        f"by {path} it serves a model of other sizes: {'; '.join(others)}; start it from our model, or name its model "
        "in model.hf_dir"
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a Qwen3 of this config.json has; null counts as absent, but for key and value heads."""
    found = {key: default if config.get(key) is None else config[key] for key, default in QWEN3_DEFAULTS.items()}
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _shown(value: Any) -> str:
    """As config.json has it: `true`, not `True`."""
    return json.dumps(value)
