"""A server whose model is of another size is refused, where its config.json tells: weights of ours would end it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.architecture import PRESETS
from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError
from megatron_klear.model import hf_config
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.rollout.sglang.sizes import QWEN3_DEFAULTS
from tests.rollout.sglang.conftest import VOCAB, StandIn

OURS = hf_config(PRESETS["qwen3-4b"])


def connect(stand_in: StandIn, sizes: dict[str, Any] | None = OURS) -> None:
    expected = Expected(vocab_size=VOCAB, longest_sequence=100, sizes=sizes)
    SglangEngine([stand_in.url], SglangSettings(), expected, in_flight=4).close()


def problem(stand_in: StandIn, sizes: dict[str, Any] = OURS) -> str:
    with pytest.raises(ConfigError) as error:
        connect(stand_in, sizes)
    (found,) = error.value.problems
    return found


def served(folder: Path, stand_in: StandIn, config: Any, override: dict[str, Any] | None = None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    stand_in.answers["/model_info"] |= {"model_path": str(folder)}
    stand_in.answers["/server_info"] |= {"json_model_override_args": json.dumps(override or {})}


def test_another_model_of_the_same_family_is_refused_with_every_size(stand_in: StandIn, tmp_path: Path) -> None:
    served(tmp_path, stand_in, OURS)
    connect(stand_in)
    served(tmp_path, stand_in, hf_config(PRESETS["qwen3-8b"]))
    assert problem(stand_in) == (
        f"sglang.urls: engine 0 ({stand_in.url}): by {tmp_path}/config.json it serves a model of other sizes: "
        "hidden_size 4096, ours 2560 (model.hidden_size); intermediate_size 12288, ours 9728 (model.ffn_hidden_size); "
        "tie_word_embeddings false, ours true (model.tie_embeddings); "
        "start it from our model, or name its model in model.hf_dir"
    )
    connect(stand_in, sizes=None)


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_attention_heads"),
        ("num_key_value_heads", "num_query_groups"),
        ("head_dim", "head_dim"),
    ],
)
def test_one_other_size_is_enough_wherever_it_stands(stand_in: StandIn, tmp_path: Path, key: str, setting: str) -> None:
    served(tmp_path, stand_in, OURS | {key: 2})
    assert f"of other sizes: {key} 2, ours {OURS[key]} (model.{setting}); start it" in problem(stand_in)
    served(tmp_path, stand_in, OURS | {key: 2}, {key: OURS[key]})
    connect(stand_in)
    served(tmp_path, stand_in, OURS, {key: 2})
    assert f"{key} 2, ours {OURS[key]}" in problem(stand_in), "what is laid over its config.json counts"


def test_keys_that_are_not_there_are_what_transformers_takes_them_for(stand_in: StandIn, tmp_path: Path) -> None:
    from transformers import Qwen3Config

    assert {key: getattr(Qwen3Config(), key) for key in QWEN3_DEFAULTS} == QWEN3_DEFAULTS
    served(tmp_path, stand_in, {key: value for key, value in OURS.items() if key not in ("head_dim", "hidden_act")})
    connect(stand_in)
    served(tmp_path, stand_in, {key: value for key, value in OURS.items() if key != "tie_word_embeddings"})
    assert "tie_word_embeddings false, ours true" in problem(stand_in)
    heads = OURS | {"num_key_value_heads": OURS["num_attention_heads"]}
    served(tmp_path, stand_in, OURS | {"num_key_value_heads": None})
    connect(stand_in, heads)
    assert Qwen3Config(num_attention_heads=4, num_key_value_heads=None).num_key_value_heads == 4


def test_a_server_has_the_sizes_that_it_was_started_with(stand_in: StandIn, tmp_path: Path) -> None:
    """Files of a larger feed-forward are loaded without a word, and their folder is then that of the model."""
    for name, config in (("started", OURS | {"intermediate_size": 64}), ("published", OURS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    stand_in.answers["/model_info"] |= {"model_path": str(tmp_path / "published")}
    stand_in.answers["/server_info"] |= {"model_path": str(tmp_path / "started")}
    assert f"by {tmp_path}/started/config.json" in problem(stand_in)


@pytest.mark.parametrize("config", [None, [], 3])
def test_sizes_that_cannot_be_read_are_warned_of(
    stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any
) -> None:
    served(tmp_path, stand_in, config)
    if config is None:
        stand_in.answers["/model_info"] |= {"model_path": "Qwen/Qwen3-8B"}
    connect(stand_in)
    assert "nothing here tells the sizes of its model: " in caplog.text
    assert "config.json cannot be read" in caplog.text


def test_a_model_of_another_family_is_refused_as_such_only(stand_in: StandIn, tmp_path: Path) -> None:
    served(tmp_path, stand_in, {"hidden_size": 8})
    stand_in.answers["/model_info"] |= {"architectures": ["LlamaForCausalLM"]}
    assert "it serves LlamaForCausalLM, needs Qwen3ForCausalLM" in problem(stand_in)
