"""Presets against the published parameter counts, and config.json against transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_klear.config import PRESETS, ModelSettings, padded_vocab_size, read_hf_architecture, resolve_architecture
from megatron_klear.errors import ConfigError


def num_parameters(a) -> int:
    """Count a Qwen3 model's weights matrix by matrix."""
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_query_groups) + 2 * a.head_dim
    layer = attention + 3 * a.hidden_size * a.ffn_hidden_size + 2 * a.hidden_size
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tie_embeddings else 2)
    return embeddings + a.num_layers * layer + a.hidden_size


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total):
    assert num_parameters(PRESETS[name]) == total


def test_config_json_is_read_in_the_form_of_transformers_4(hf_dir):
    found = read_hf_architecture(hf_dir)
    assert dataclasses.astuple(found) == (3, 64, 96, 4, 2, 24, 300, 512, 5e5, 1e-5, True, 0.03)


def test_config_json_is_read_in_the_form_the_installed_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    a = PRESETS["qwen3-tiny-tied"]
    transformers.Qwen3Config(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_query_groups,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_position_embeddings,
        rms_norm_eps=a.rms_norm_eps,
        tie_word_embeddings=a.tie_embeddings,
        rope_theta=a.rope_theta,
    ).save_pretrained(tmp_path)
    assert read_hf_architecture(tmp_path) == a


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen3'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling asks for 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters asks for 'yarn'"),
    ],
)
def test_a_config_json_that_cannot_be_used_is_refused(hf_dir, change, text):
    path = hf_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"model\.hf_dir") as caught:
        read_hf_architecture(hf_dir)
    assert any(text in problem for problem in caught.value.problems)


@pytest.mark.parametrize("content", ["{", "[]", "\u00e9\x00"])
def test_a_malformed_config_json_is_refused(hf_dir, content):
    (hf_dir / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.hf_dir"):
        read_hf_architecture(hf_dir)


def test_a_missing_config_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_hf_architecture(tmp_path / "nowhere")


def test_overrides_win_over_the_preset():
    found = resolve_architecture(ModelSettings(preset="qwen3-8b", num_layers=2, rope_theta=5e6))
    assert found == dataclasses.replace(PRESETS["qwen3-8b"], num_layers=2, rope_theta=5e6)


def test_hf_dir_gives_the_architecture_and_its_shapes_cannot_be_overridden(hf_dir):
    found = resolve_architecture(ModelSettings(hf_dir=str(hf_dir), max_position_embeddings=2048))
    assert (found.hidden_size, found.max_position_embeddings) == (64, 2048)
    with pytest.raises(ConfigError) as caught:
        resolve_architecture(ModelSettings(hf_dir=str(hf_dir), hidden_size=128, num_layers=5))
    assert [p.split(":")[0] for p in caught.value.problems] == ["model.num_layers", "model.hidden_size"]


def test_preset_and_hf_dir_must_agree_in_shapes_only(hf_dir):
    with pytest.raises(ConfigError, match="qwen3-8b has num_layers 36, the weights in"):
        resolve_architecture(ModelSettings(preset="qwen3-8b", hf_dir=str(hf_dir)))


def test_agreeing_preset_and_hf_dir_take_the_weights_own_positions(hf_dir):
    path = hf_dir / "config.json"
    a = PRESETS["qwen3-tiny"]
    shapes = {
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "head_dim": a.head_dim,
        "vocab_size": a.vocab_size,
        "tie_word_embeddings": a.tie_embeddings,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | shapes))
    found = resolve_architecture(ModelSettings(preset="qwen3-tiny", hf_dir=str(hf_dir)))
    assert (found.num_layers, found.max_position_embeddings, found.rope_theta) == (4, 512, 5e5)


def test_nothing_given_names_what_is_missing():
    with pytest.raises(ConfigError, match="qwen3-8b") as caught:
        resolve_architecture(ModelSettings(num_layers=2))
    assert "model.hidden_size" in str(caught.value)
    assert "model.num_layers" not in str(caught.value)


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError) as caught:
        resolve_architecture(ModelSettings(preset="qwen3-tiny", num_query_groups=3, head_dim=31))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(("size", "multiple", "padded"), [(1, 128, 128), (128, 128, 128), (129, 128, 256), (7, 1, 7)])
def test_the_vocabulary_is_padded_up(size, multiple, padded):
    assert padded_vocab_size(size, multiple) == padded


def test_no_published_vocabulary_needs_padding():
    assert padded_vocab_size(151936, 128) == 151936
