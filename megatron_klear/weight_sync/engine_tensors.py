"""The tensors that an SGLang engine makes of Hugging Face's Qwen3 tensors: some fused, split over its ranks, padded.

Read off SGLang 0.5.23: `models/qwen3.py` (what is fused), `layers/linear.py` (how it is split) and
`layers/vocab_parallel_embedding.py` (padding of the vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

VOCABULARY_PADDING = 64

_FUSED = {
    "self_attn.q_proj.weight": ("self_attn.qkv_proj.weight", 3),
    "self_attn.k_proj.weight": ("self_attn.qkv_proj.weight", 3),
    "self_attn.v_proj.weight": ("self_attn.qkv_proj.weight", 3),
    "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 2),
    "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", 2),
}
"""Hugging Face's name within a layer -> the engine's, and how many tensors it is made of, in stream order."""

_SPLIT_BY_COLUMN = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def engine_tensors(
    named_tensors: Iterable[tuple[str, torch.Tensor]], *, tp: int, head_dim: int
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Name and shard of every rank for each of the engine's tensors, as soon as its parts have come.

    Args:
        named_tensors: Hugging Face names, in forward order; parts of a fused tensor follow one another.
        tp: the engine's tensor parallel size.
        head_dim: channels of one attention head.
    """
    parts: list[torch.Tensor] = []
    for name, tensor in named_tensors:
        layer, inner = _apart(name)
        if inner in _FUSED:
            parts.append(tensor)
            fused, count = _FUSED[inner]
            if len(parts) == count:
                split = _qkv_shards if count == 3 else _gate_up_shards
                yield layer + fused, split(parts, tp, head_dim)
                parts = []
        elif inner in _SPLIT_BY_COLUMN:
            yield name, list(tensor.chunk(tp, dim=1))
        elif name in _VOCABULARY:
            yield name, _vocabulary_shards(tensor, tp)
        else:
            yield name, [tensor] * tp


def _apart(name: str) -> tuple[str, str]:
    """("model.layers.7.", the rest), or ("", name) outside the layers."""
    if not name.startswith("model.layers."):
        return "", name
    head, _, inner = name.removeprefix("model.layers.").partition(".")
    return f"model.layers.{head}.", inner


def _qkv_shards(parts: Sequence[torch.Tensor], tp: int, head_dim: int) -> list[torch.Tensor]:
    """Each rank's query heads, then its key heads, then its value heads; few key heads are held by several ranks."""
    q, k, v = parts
    kv_heads = k.shape[0] // head_dim
    sharing = max(1, tp // kv_heads)
    return [
        torch.cat([q.chunk(tp)[rank], *(part.chunk(tp // sharing)[rank // sharing] for part in (k, v))])
        for rank in range(tp)
    ]


def _gate_up_shards(parts: Sequence[torch.Tensor], tp: int, head_dim: int) -> list[torch.Tensor]:
    gate, up = parts
    return [torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]) for rank in range(tp)]


def _vocabulary_shards(tensor: torch.Tensor, tp: int) -> list[torch.Tensor]:
    multiple = VOCABULARY_PADDING
    if -(-tensor.shape[0] // multiple) * multiple % tp:
        multiple *= tp
    padding = -tensor.shape[0] % multiple
    padded = torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]) if padding else tensor
    return list(padded.chunk(tp))
