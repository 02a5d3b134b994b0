"""Which Hugging Face tensors make up which Megatron tensor, and how each is split over tensor parallel ranks.

A *whole* tensor here is a Megatron parameter as it would be with tensor parallel size 1, which is also how
Megatron's distributed checkpoints store it. Three of them are not a plain copy of a Hugging Face tensor:

- `linear_qkv` interleaves by query group: the group's query heads, its key head, its value head;
- `linear_fc1` stacks gate above up, and every tensor-parallel rank holds its own share of each;
- embedding and output rows are padded so that the vocabulary divides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_klear.config import Architecture

Kind = Literal["plain", "qkv", "gate_up", "vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Attributes:
        name: Megatron's name; layers are numbered over the whole model, "decoder.layers.7.mlp...".
        hf_names: Hugging Face names, in stacking order.
        hf_shapes: their shapes.
        kind: how they combine.
        split_dim: dimension that tensor parallelism splits, None when every rank holds all of it.
        layer: layer number, None outside the layers.
    """

    name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind = "plain"
    split_dim: int | None = None
    layer: int | None = None


def tensor_rules(arch: Architecture, *, layer_kind: str = "local") -> Iterator[TensorRule]:
    """All parameters of the model in forward order.

    Args:
        arch: the architecture.
        layer_kind: `local` or `te`; Transformer Engine fuses two norms into the linear layers behind them, which
            changes parameter names but not the names in a checkpoint.
    """
    hidden, vocab = arch.hidden_size, arch.vocab_size
    yield TensorRule(
        name="embedding.word_embeddings.weight",
        hf_names=("model.embed_tokens.weight",),
        hf_shapes=((vocab, hidden),),
        kind="vocabulary",
        split_dim=0,
    )
    for layer in range(arch.num_layers):
        yield from _layer_rules(arch, layer, layer_kind)
    yield TensorRule(name="decoder.final_layernorm.weight", hf_names=("model.norm.weight",), hf_shapes=((hidden,),))
    if not arch.tie_embeddings:
        yield TensorRule(
            name="output_layer.weight",
            hf_names=("lm_head.weight",),
            hf_shapes=((vocab, hidden),),
            kind="vocabulary",
            split_dim=0,
        )


def _layer_rules(arch: Architecture, layer: int, layer_kind: str) -> Iterator[TensorRule]:
    hidden, ffn, head = arch.hidden_size, arch.ffn_hidden_size, arch.head_dim
    queries, groups = arch.num_attention_heads * head, arch.num_query_groups * head
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    te = layer_kind == "te"

    def rule(
        name: str, parts: Mapping[str, tuple[int, ...]], kind: Kind = "plain", split: int | None = None
    ) -> TensorRule:
        return TensorRule(
            name=ours + name,
            hf_names=tuple(theirs + part for part in parts),
            hf_shapes=tuple(parts.values()),
            kind=kind,
            split_dim=split,
            layer=layer,
        )

    yield rule(
        "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight",
        {"input_layernorm.weight": (hidden,)},
    )
    yield rule(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (groups, hidden),
            "self_attn.v_proj.weight": (groups, hidden),
        },
        kind="qkv",
        split=0,
    )
    yield rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": (head,)})
    yield rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": (head,)})
    yield rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, queries)}, split=1)
    yield rule(
        "mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": (hidden,)},
    )
    yield rule(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)},
        kind="gate_up",
        split=0,
    )
    yield rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, ffn)}, split=1)


def whole_from_hf(
    rule: TensorRule, parts: Sequence[torch.Tensor], arch: Architecture, padded_vocab: int
) -> torch.Tensor:
    """Combine Hugging Face tensors into the whole Megatron tensor.

    Args:
        rule: the parameter.
        parts: tensors of `rule.hf_names`, in order.
        arch: the architecture.
        padded_vocab: rows of the padded vocabulary; padding rows are zero.
    """
    if rule.kind == "qkv":
        q, k, v = (part.view(arch.num_query_groups, -1, *part.shape[1:]) for part in parts)
        return torch.cat([q, k, v], dim=1).reshape(-1, *parts[0].shape[1:])
    if rule.kind == "gate_up":
        return torch.cat(list(parts))
    if rule.kind == "vocabulary":
        padding = parts[0].new_zeros(padded_vocab - parts[0].size(0), parts[0].size(1))
        return torch.cat([parts[0], padding])
    return parts[0]


def hf_from_whole(rule: TensorRule, whole: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
    """Take a whole Megatron tensor apart into the tensors of `rule.hf_names`, in order; drops padding rows."""
    if rule.kind == "qkv":
        per_group = arch.num_attention_heads // arch.num_query_groups
        grouped = whole.view(arch.num_query_groups, (per_group + 2) * arch.head_dim, *whole.shape[1:])
        sizes = [per_group * arch.head_dim, arch.head_dim, arch.head_dim]
        return [part.reshape(-1, *whole.shape[1:]) for part in grouped.split(sizes, dim=1)]
    if rule.kind == "gate_up":
        return list(whole.chunk(2))
    if rule.kind == "vocabulary":
        return [whole[: arch.vocab_size]]
    return [whole]


def shard(rule: TensorRule, whole: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The share of a whole tensor that one tensor-parallel rank holds."""
    if rule.split_dim is None or tp_size == 1:
        return whole
    if rule.kind == "gate_up":
        return torch.cat([half.chunk(tp_size)[tp_rank] for half in whole.chunk(2)])
    return whole.chunk(tp_size, dim=rule.split_dim)[tp_rank]


def unshard(rule: TensorRule, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from the shares of all tensor-parallel ranks, in rank order."""
    if rule.split_dim is None or len(shards) == 1:
        return shards[0]
    if rule.kind == "gate_up":
        halves = [part.chunk(2) for part in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(list(shards), dim=rule.split_dim)


def shard_shape(rule: TensorRule, arch: Architecture, tp_size: int, padded_vocab: int) -> tuple[int, ...]:
    """Shape of the share that one tensor-parallel rank holds."""
    rows = padded_vocab if rule.kind == "vocabulary" else sum(shape[0] for shape in rule.hf_shapes)
    shape = [rows, *rule.hf_shapes[0][1:]]
    if rule.split_dim is not None:
        shape[rule.split_dim] //= tp_size
    return tuple(shape)
