"""The name map against index arithmetic written out by hand, and against transformers' own model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_klear.config import Architecture
from megatron_klear.model.hf_names import (
    TensorRule,
    hf_from_whole,
    shard,
    shard_shape,
    tensor_rules,
    unshard,
    whole_from_hf,
)

UNTIED = Architecture(
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=24,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    vocab_size=50,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    init_std=0.02,
)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
PADDED = 56


def rules(arch: Architecture = UNTIED, layer_kind: str = "local") -> dict[str, TensorRule]:
    return {rule.name: rule for rule in tensor_rules(arch, layer_kind=layer_kind)}


def random_parts(rule: TensorRule) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(rule.name))
    return [torch.randn(shape, generator=generator) for shape in rule.hf_shapes]


@pytest.mark.parametrize("arch", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layer_kind", ["local", "te"])
def test_every_tensor_of_transformers_model_is_named_once_with_its_shape(arch: Architecture, layer_kind: str) -> None:
    config = Qwen3Config(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.head_dim,
        tie_word_embeddings=arch.tie_embeddings,
    )
    with torch.device("meta"):
        theirs = {name: tuple(p.shape) for name, p in Qwen3ForCausalLM(config).named_parameters()}
    ours = [
        pair
        for rule in tensor_rules(arch, layer_kind=layer_kind)
        for pair in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    assert len(ours) == len(dict(ours))
    assert dict(ours) == theirs


def test_query_key_and_value_heads_interleave_by_group() -> None:
    rule = rules()["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = random_parts(rule)
    whole = whole_from_hf(rule, [q, k, v], UNTIED, PADDED)
    rows = []
    for group in range(4):
        for head in (2 * group, 2 * group + 1):
            rows += [q[head * 6 + i] for i in range(6)]
        rows += [k[group * 6 + i] for i in range(6)]
        rows += [v[group * 6 + i] for i in range(6)]
    assert torch.equal(whole, torch.stack(rows))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_holds_whole_groups_and_its_share_of_gate_and_of_up(tp: int) -> None:
    qkv = rules()["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = random_parts(qkv)
    fc1 = rules()["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = random_parts(fc1)
    groups = 4 // tp
    for rank in range(tp):
        mine = shard(qkv, whole_from_hf(qkv, [q, k, v], UNTIED, PADDED), rank, tp)
        of_group = mine.view(groups, 4, 6, 20)
        for i in range(groups):
            group = rank * groups + i
            assert torch.equal(of_group[i, :2].reshape(12, 20), q[12 * group : 12 * group + 12])
            assert torch.equal(of_group[i, 2], k[6 * group : 6 * group + 6])
            assert torch.equal(of_group[i, 3], v[6 * group : 6 * group + 6])
        size = 24 // tp
        mine = shard(fc1, whole_from_hf(fc1, [gate, up], UNTIED, PADDED), rank, tp)
        assert torch.equal(mine[:size], gate[rank * size : (rank + 1) * size])
        assert torch.equal(mine[size:], up[rank * size : (rank + 1) * size])


def test_vocabulary_is_padded_with_zeros_at_the_end() -> None:
    rule = rules()["output_layer.weight"]
    (rows,) = random_parts(rule)
    whole = whole_from_hf(rule, [rows], UNTIED, PADDED)
    assert torch.equal(whole[:50], rows)
    assert torch.equal(whole[50:], torch.zeros(6, 20))
    assert torch.equal(hf_from_whole(rule, whole, UNTIED)[0], rows)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", list(rules()))
def test_there_and_back_is_exact(name: str, tp: int) -> None:
    rule = rules()[name]
    parts = random_parts(rule)
    whole = whole_from_hf(rule, parts, UNTIED, PADDED)
    shards = [shard(rule, whole, rank, tp) for rank in range(tp)]
    for mine in shards:
        assert tuple(mine.shape) == shard_shape(rule, UNTIED, tp, PADDED)
    assert torch.equal(unshard(rule, shards), whole)
    back = hf_from_whole(rule, whole, UNTIED)
    assert len(back) == len(parts)
    for ours, original in zip(back, parts, strict=True):
        assert torch.equal(ours, original)


def test_tensor_parallel_shares_hold_everything_once() -> None:
    for rule in tensor_rules(UNTIED):
        whole = whole_from_hf(rule, random_parts(rule), UNTIED, PADDED)
        shards = [shard(rule, whole, rank, 2) for rank in range(2)]
        if rule.split_dim is None:
            assert all(torch.equal(mine, whole) for mine in shards)
        else:
            together = torch.cat([mine.flatten() for mine in shards]).sort().values
            assert torch.equal(together, whole.flatten().sort().values)


def test_transformer_engine_renames_the_two_norms_before_the_linear_layers() -> None:
    local, te = rules(), rules(layer_kind="te")
    renamed = {a: b for a, b in zip(local, te, strict=True) if a != b}
    assert renamed == {
        f"decoder.layers.{n}.{before}": f"decoder.layers.{n}.{after}"
        for n in range(3)
        for before, after in (
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        )
    }
    assert all(local[a].hf_names == te[b].hf_names for a, b in renamed.items())


def test_tied_models_have_no_output_layer_of_their_own() -> None:
    assert set(rules(UNTIED)) - set(rules(TIED)) == {"output_layer.weight"}


def test_layers_are_numbered() -> None:
    assert {rule.layer for rule in tensor_rules(UNTIED)} == {None, 0, 1, 2}
    for rule in tensor_rules(UNTIED):
        assert (rule.layer is None) == (not rule.name.startswith("decoder.layers."))
        if rule.layer is not None:
            assert rule.name.startswith(f"decoder.layers.{rule.layer}.")
            assert all(name.startswith(f"model.layers.{rule.layer}.") for name in rule.hf_names)
