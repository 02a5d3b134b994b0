"""How Qwen3 is built of the modules of Transformer Engine, on a stand-in; what they compute needs a GPU to test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config import Architecture
from megatron_klear.model.hf_names import shard_shape, tensor_rules

ROOT = Path(__file__).parents[2]
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
ARCH = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    vocab_size=61, max_position_embeddings=64, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, init_std=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """In a process of its own: Megatron looks for Transformer Engine once, when it is imported."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    worker = Path(__file__).with_name("transformer_engine_worker.py")
    done = subprocess.run([sys.executable, worker], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_module_is_the_one_meant_for_it(built: dict[str, Any]) -> None:
    modules = built["modules"]
    layer = "decoder.layers.2."
    assert modules[layer + "self_attention.linear_qkv"] == "TELayerNormColumnParallelLinear"
    assert modules[layer + "mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert modules[layer + "self_attention.linear_proj"] == modules[layer + "mlp.linear_fc2"] == "TERowParallelLinear"
    assert modules[layer + "self_attention.core_attention"] == "TEDotProductAttention"
    assert modules[layer + "input_layernorm"] == modules[layer + "pre_mlp_layernorm"] == "IdentityOp"
    assert {modules[layer + f"self_attention.{name}_layernorm"] for name in "qk"} == {"RMSNorm"}
    assert modules["decoder.final_layernorm"] == "RMSNorm"
    assert modules["output_layer"] == "FusedHead"
    assert built["eps"] == [1e-6, 1e-6]


def test_names_and_shapes_are_those_that_conversion_and_publishing_expect(built: dict[str, Any]) -> None:
    expected = {rule.name: list(shard_shape(rule, ARCH, 1, 64)) for rule in tensor_rules(ARCH, layer_kind="te")}
    assert built["parameters"] == expected


def test_packs_reach_attention_as_thd_and_the_model_computes_what_our_layers_do(built: dict[str, Any]) -> None:
    offsets = [0, 9, 42, 44, 64]
    assert built["attention"] == {
        "format": "thd", "mask": "padding_causal", "max": [33, 33], "offsets": offsets, "padded": offsets,
    }  # fmt: skip
    assert built["attention_options"] == {
        "num_attention_heads": 4, "kv_channels": 16, "num_gqa_groups": 2, "attn_mask_type": "causal",
        "attention_dropout": 0.0,
    }  # fmt: skip
    # The same products in the same order, attention by one kernel: four layers of float32.
    assert built["difference"] < 64 * 2**-24 * built["scale"]


def test_yarn_scales_rotary_angles_of_packed_sequences_too(built: dict[str, Any]) -> None:
    assert built["yarn_difference"] < 64 * 2**-24 * built["scale"]
    assert built["yarn_matters"] > 1e-3


def test_layers_run_in_fp8_but_for_those_left_out_and_the_head_never(built: dict[str, Any]) -> None:
    recipes = built["recipes"]
    for name, kind in (("delayed", "TEDelayedScaling"), ("blockwise", "Float8BlockScaling")):
        ran = recipes[name]["ran"]
        assert ran == {f"decoder.layers.{layer}.{part}": kind for layer in range(4) for part in LINEAR}
    wanted = {0: "none", 1: "Float8CurrentScaling", 2: "none", 3: "none"}
    assert recipes["tensorwise"]["ran"] == {
        f"decoder.layers.{layer}.{part}": kind for layer, kind in wanted.items() for part in LINEAR
    }
    assert {tuple(recipe["head"]) for recipe in recipes.values()} == {("FusedHead", "torch.bfloat16")}
    formats = {name: recipe["options"]["fp8_format"] for name, recipe in recipes.items()}
    assert formats == {"delayed": "HYBRID", "tensorwise": "HYBRID", "blockwise": "E4M3"}
    assert recipes["delayed"]["options"]["amax_history_len"] == "7"
    assert recipes["delayed"]["options"]["amax_compute_algo"] == "max"
    assert {name: recipe["tokens"] for name, recipe in recipes.items()} == {
        "delayed": 64, "tensorwise": 64, "blockwise": 128,
    }  # fmt: skip
