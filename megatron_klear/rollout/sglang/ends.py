"""At which tokens a server ends responses beside those that a request names, as far as it can be known.

SGLang ends them at the `eos_token_id` of its model's config.json and generation_config.json and at its tokenizer's end
token, and tells none of this over HTTP. It tells the folders of both, so the ids are known where these can be read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from megatron_klear.data.end_tokens import end_ids, tokenizer_end_id
from megatron_klear.errors import DataError
from megatron_klear.rollout.sglang.model_folder import started_from

log = logging.getLogger(__name__)


def ends_problem(
    name: str, server: Mapping[str, Any], model: Mapping[str, Any], stop_ids: Collection[int]
) -> str | None:
    """What is wrong with a server's end tokens; a line in the log where they cannot be read.

    Args:
        name: of the server, for the log.
        server, model: its answers at /server_info and /model_info.
        stop_ids: the only ids that may end a response.
    """
    path = started_from(server, model)
    try:
        if not (path / "config.json").is_file():
            raise DataError(f"no {path / 'config.json'}")
        found = {*end_ids(path), *_overridden(server), *_tokenizers(server, model)}
    except DataError as error:
        log.warning(
            "%s: nothing here tells which tokens end its responses beside %s: %s; an answer that ends at another is "
            "drawn again (malformed answers), which changes what is sampled",
            name, sorted(stop_ids), error,
        )  # fmt: skip
        return None
    others = sorted(found - set(stop_ids))
    if not others:
        return None
    return (
        f"by eos_token_id and the tokenizer in {path} it ends responses at {others}, too, and ours end at "
        f"{sorted(stop_ids)} only; start it from model.hf_dir, or name these tokens in rollout.stop_tokens"
    )


def _overridden(server: Mapping[str, Any]) -> Collection[int]:
    """Ids in what is laid over its config.json (`--json-model-override-args`)."""
    try:
        value = json.loads(server.get("json_model_override_args") or "{}").get("eos_token_id")
    except (ValueError, TypeError, AttributeError):
        return ()
    return value if isinstance(value, list) else () if value is None else (value,)


def _tokenizers(server: Mapping[str, Any], model: Mapping[str, Any]) -> Collection[int]:
    if server.get("skip_tokenizer_init"):
        return ()
    found = tokenizer_end_id(str(model.get("tokenizer_path") or started_from(server, model)))
    return () if found is None else (found,)
