"""Hugging Face's tensors as an engine holds them: fused, split, padded, row by row."""

from __future__ import annotations

import pytest
import torch

from megatron_klear.weight_sync.buckets import bucketed, converted
from megatron_klear.weight_sync.engine_tensors import engine_tensors

HEAD, Q_HEADS, KV_HEADS, HIDDEN, FFN, VOCAB = 2, 8, 2, 6, 16, 70


def stream() -> dict[str, torch.Tensor]:
    """One layer whose every element is different."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.self_attn.q_proj.weight": (Q_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, Q_HEADS * HEAD),
        "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    made, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        made[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    return made


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_holds_its_heads_columns_and_rows(tp: int) -> None:
    theirs = stream()
    found = dict(engine_tensors(theirs.items(), tp=tp, head_dim=HEAD))
    layer = "model.layers.0."
    assert set(found) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(layer + n for n in ("input_layernorm.weight", "self_attn.qkv_proj.weight", "self_attn.o_proj.weight")),
        *(layer + n for n in ("mlp.gate_up_proj.weight", "mlp.down_proj.weight")),
    }
    q, k, v = (theirs[f"{layer}self_attn.{n}_proj.weight"] for n in "qkv")
    for rank in range(tp):
        heads = range(rank * Q_HEADS // tp, (rank + 1) * Q_HEADS // tp)
        # A query head i attends with key head i // (Q_HEADS / KV_HEADS); a rank holds those that its queries need.
        groups = sorted({head * KV_HEADS // Q_HEADS for head in heads})
        rows = [q[h * HEAD : (h + 1) * HEAD] for h in heads]
        rows += [part[g * HEAD : (g + 1) * HEAD] for part in (k, v) for g in groups]
        assert torch.equal(found[layer + "self_attn.qkv_proj.weight"][rank], torch.cat(rows))
        share = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
        gate_up = torch.cat([theirs[f"{layer}mlp.{n}_proj.weight"][share] for n in ("gate", "up")])
        assert torch.equal(found[layer + "mlp.gate_up_proj.weight"][rank], gate_up)
        assert torch.equal(
            found[layer + "mlp.down_proj.weight"][rank], theirs[f"{layer}mlp.down_proj.weight"][:, share]
        )
        width = Q_HEADS * HEAD // tp
        o_proj = theirs[f"{layer}self_attn.o_proj.weight"][:, rank * width : (rank + 1) * width]
        assert torch.equal(found[layer + "self_attn.o_proj.weight"][rank], o_proj)
        assert torch.equal(found[layer + "input_layernorm.weight"][rank], theirs[f"{layer}input_layernorm.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = torch.cat(found[name])
        assert whole.shape == (128, HIDDEN)  # the next multiple of 64
        assert torch.equal(whole[:VOCAB], theirs[name])
        assert not whole[VOCAB:].any()
        assert len({shard.shape for shard in found[name]}) == 1


def test_buckets_keep_order_and_size() -> None:
    theirs = stream()
    buckets = list(bucketed(theirs.items(), 400))
    assert [n for b in buckets for n in b.names] == list(theirs)
    assert all(b.num_bytes <= 400 or len(b.names) == 1 for b in buckets)
    assert any(len(b.names) > 1 for b in buckets)
    for bucket in buckets:
        expected = b"".join(theirs[name].numpy().tobytes() for name in bucket.names)
        assert bucket.flat().numpy().tobytes() == expected
        assert bucket.num_bytes == len(expected)


def test_conversion_rounds_to_nearest_even() -> None:
    values = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8 - 2**-12])
    ((name, tensor),) = converted([("a", values)], torch.bfloat16)
    assert name == "a"
    assert tensor.tolist() == [1.0, 1.0 + 2**-6, -1.0 - 2**-7]
