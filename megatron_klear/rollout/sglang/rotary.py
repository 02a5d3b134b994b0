"""Which rotary embedding a server computes with, as far as it can be known.

SGLang tells no frequencies over HTTP. It tells the folder of its model and what was laid over its config.json
(`--json-model-override-args`), so the embedding is known where that folder can be read from here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from megatron_klear.config.yarn import Yarn, yarn_of_hf_config
from megatron_klear.rollout.sglang.model_folder import started_from

log = logging.getLogger(__name__)

_KEYS = ("rope_parameters", "rope_scaling")


def rotary_problem(name: str, server: Mapping[str, Any], model: Mapping[str, Any], wanted: Yarn | None) -> str | None:
    """What is wrong with a server's rotary embedding; a line in the log where YaRN is wanted and nothing is known.

    Args:
        name: of the server, for the log.
        server, model: its answers at /server_info and /model_info.
        wanted: YaRN that it must compute with, None for none.
    """
    path = started_from(server, model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        override = json.loads(server.get("json_model_override_args") or "{}")
        asked = {
            **{key: value for key, value in config.items() if key not in _KEYS or not _names(override)},
            **override,
        }
    except (OSError, ValueError, TypeError, AttributeError):
        if wanted is not None:
            log.warning(
                "%s: nothing here tells whether it computes with YaRN of factor %g (yarn.factor): its model's %s "
                "cannot be read; start it from a config.json with rope_scaling %s, or it computes other numbers",
                name, wanted.factor, path, json.dumps(wanted.hf_scaling()),
            )  # fmt: skip
        return None
    found = yarn_of_hf_config(asked)
    others = [rope for rope in map(asked.get, _KEYS) if _is_scaled(rope)]
    if found == wanted and (found is not None or not others):
        return None
    has = _described(found) if found is not None or not others else f"the rotary embedding {json.dumps(others[0])}"
    want = f"ours {_described(wanted)} (yarn.factor, yarn.original_positions, yarn.apply_to)"
    scaling = "null" if wanted is None else json.dumps(wanted.hf_scaling())
    return f"by {path} it computes with {has}, {want}; start it with rope_scaling {scaling}"


def _names(override: Mapping[str, Any]) -> bool:
    return any(key in override for key in _KEYS)


def _is_scaled(rope: Any) -> bool:
    return isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default"


def _described(yarn: Yarn | None) -> str:
    return "no YaRN" if yarn is None else f"YaRN of factor {yarn.factor:g} from {yarn.original_positions} positions"
