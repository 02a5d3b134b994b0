"""What autograd keeps of one microbatch from its forward to its backward pass, by kind of layers and recompute policy.

Counted are whole storages, each once, as torch's saved-tensor hooks see them. `cpu` is Megatron's local layers without
fused kernels, held against such hooks on the real model in tests. `local` (torch's fused RMSNorm, flash-attn, fused
SwiGLU) and `te` (Transformer Engine's layers, in bfloat16 and FP8) are read from these packages' autograd functions:
benchmarks/planner_error.py compares them with a GPU's own peak, which no GPU has done yet.

Letters: t tokens of this rank, r of them where sequence parallelism splits them, e bytes of a number, h hidden size, q
query channels, k key (or value) channels, f feed-forward channels, all of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_klear.config import Settings, padded_vocab_size
from megatron_klear.planning.fp8 import copies, number_bytes

LayerKind = Literal["te", "local", "cpu"]

HEAD_CHUNK_BYTES = {"cpu": 256 << 20, "gpu": 2_500_000_000}
"""Bytes of logits (or of their gradients) that the fused head holds at a time, as `klear_kernels` bounds them."""

_HEAD_WORD_BYTES = {"cpu": 4, "gpu": 2}
_STATISTICS = 6
"""Float32 vectors per token that the head keeps for its backward pass."""


def layer_kind(settings: Settings, device: str) -> LayerKind:
    """Which layers a run will be built of, if Transformer Engine is installed where there are GPUs."""
    model = settings.model
    if device == "cpu":
        return "cpu"
    unfused = model.layer_spec == "local" or model.attention in ("flash", "sdpa", "cpu") or model.dtype == "float32"
    return "local" if unfused and "te" not in (model.layer_spec, model.attention) else "te"


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Sizes of one microbatch on one rank.

    Attributes:
        tokens, rows: t and r.
        itemsize: e.
        hidden, queries, keys, ffn: h, q, k, f.
        heads: query heads of this rank.
        groups: key heads of this rank.
        head_dim: channels of one head.
        tp, cp: tensor and context parallel ranks.
    """

    tokens: float
    rows: float
    itemsize: int
    hidden: int
    queries: int
    keys: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    tp: int
    cp: int


def widths(settings: Settings, budget: int | None = None) -> Widths:
    """Sizes of a microbatch that fills `packing.token_budget`, or holds `budget` tokens over context parallel ranks."""
    arch, parallel = settings.architecture, settings.parallel
    tokens = (settings.packing.token_budget if budget is None else budget) / parallel.cp
    heads, groups = arch.num_attention_heads // parallel.tp, arch.num_query_groups // parallel.tp
    return Widths(
        tokens=tokens,
        rows=tokens / parallel.tp if parallel.sequence_parallel else tokens,
        itemsize=2 if settings.model.dtype == "bfloat16" else 4,
        hidden=arch.hidden_size,
        queries=heads * arch.head_dim,
        keys=groups * arch.head_dim,
        ffn=arch.ffn_hidden_size // parallel.tp,
        heads=heads,
        groups=groups,
        head_dim=arch.head_dim,
        tp=parallel.tp,
        cp=parallel.cp,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """Bytes that one layer keeps, by what its recomputation would give back.

    Attributes:
        core_attention: kept between the queries, keys and values and the attention's result.
        attention_inputs: queries, keys and values, kept in its stead when it alone is recomputed.
        rest: everything else but the layer's input.
        layer_input: all that is kept when the whole layer is recomputed.
    """

    core_attention: float
    attention_inputs: float
    rest: float
    layer_input: float

    def kept(self, recompute: str) -> float:
        """Bytes kept under a policy `none`, `selective` or `full`."""
        if recompute == "full":
            return self.layer_input
        return self.rest + (self.attention_inputs if recompute == "selective" else self.core_attention)


def layer_bytes(w: Widths, kind: LayerKind, recipe: str = "none") -> LayerBytes:
    """Bytes of one layer.

    Args:
        w: sizes.
        kind: what it is built of.
        recipe: of FP8 (`te` only), `none` for a layer in bfloat16.

    In FP8 a product keeps its input quantised, one copy of it: the one along columns, or under sequence parallelism and
    one scale per tensor the one along rows, which is gathered again (`_Linear` and `_LayerNormLinear` of Transformer
    Engine). The product behind attention is an exception but for the delayed recipe: attention keeps its result in
    bfloat16 anyway, and Megatron has the product keep that one too (`set_save_original_input`).
    """
    if kind == "cpu":
        return _cpu_layer(w)
    e, t, r = w.itemsize, w.tokens, w.rows
    kept = e if recipe == "none" else number_bytes(recipe)
    fused_qkv = t * (w.queries + 2 * w.keys) * e
    # Each norm keeps its input and one float32 per row, and the product behind it keeps the norm's result.
    norms = 2 * r * (w.hidden * (e + kept) + 4)
    # Queries are copied out of the fused product, keys are copied for their norm; values stay a view of it.
    heads_norms = t * (w.queries + (w.keys if kind == "te" else 0)) * e + t * (w.heads + w.groups) * 4
    feed_forward = t * w.ffn * (2 * e + kept)  # gate and up together, and their product
    output = t * w.queries * (kept if recipe == "delayed" else e)  # of attention, which the product behind it keeps
    # Where that is a copy of its own, attention keeps the result it came from as well.
    attention_output = t * w.queries * e if recipe == "delayed" else 0.0
    rotated = t * (w.queries + w.keys) * e
    # flash-attn keeps that view, and with it the whole product. Transformer Engine copies values that lie otherwise in
    # memory than keys (`get_qkv_layout`), and over context parallel ranks keeps keys and values in one new tensor
    # (`AttnFuncWithCPAndKVP2P`): as many bytes. What is recomputed keeps its inputs, the view again.
    values = t * w.keys * e if kind == "te" else fused_qkv
    rope = 0.0 if kind == "te" else 4 * t * w.head_dim * e
    softmax = t * w.heads * 4
    # Without Transformer Engine keys and values are gathered over context parallel ranks and laid out by segment: a
    # rank's two chunks of a sequence see 2 * cp + 1 chunks of keys, each half as long as what the rank holds.
    gathered = 0.0 if kind == "te" or w.cp == 1 else t * (2 * w.cp + 1) / 2 * 2 * w.keys * e
    return LayerBytes(
        core_attention=rotated + values + softmax + gathered + attention_output,
        attention_inputs=rotated + fused_qkv,
        rest=norms + heads_norms + rope + output + feed_forward,
        layer_input=r * w.hidden * e,
    )


def _cpu_layer(w: Widths) -> LayerBytes:
    e, t, r = w.itemsize, w.tokens, w.rows
    wide = e == 4
    fused_qkv = t * (w.queries + 2 * w.keys) * e
    # RMSNorm in plain torch: input and normalised rows in float32, one float32 per row. A float32 input is kept itself.
    norms = 2 * r * (2 * w.hidden * 4 + 4) + 2 * r * w.hidden * e
    queries = t * w.queries * 4 * (2 if not wide or w.groups > 1 else 1)  # one group: a view of the fused product
    keys = t * w.keys * 4 * (1 if wide else 2)
    heads_norms = queries + keys + t * (w.heads + w.groups) * 4 + (fused_qkv if wide else 0)
    rope = 4 * t * w.head_dim * e
    # SDPA's rows are picked by index, so nothing but the picked copies is kept.
    picked = t * (2 * w.queries + 2 * w.keys) * e + t * w.heads * 4
    rotated = t * (w.queries + w.keys) * e
    values = 0 if wide else fused_qkv  # a view of the fused product, which float32 norms keep anyway
    feed_forward = t * 5 * w.ffn * e  # gate and up together, silu(gate), up + 0, and the product
    return LayerBytes(
        core_attention=picked,
        attention_inputs=rotated + values,
        rest=norms + heads_norms + rope + t * w.queries * e + feed_forward,
        layer_input=r * w.hidden * e,
    )


def index_bytes(w: Widths, kind: LayerKind, recompute: str, *, first_stage: bool) -> float:
    """Bytes that all layers share: token ids, and on a CPU the rows that attention picks, or the rotary angles.

    Where the vocabulary is split, the embedding keeps which words are another rank's, one byte each.
    """
    ids = (8 + (w.tp > 1)) * w.tokens if first_stage else 0.0
    if kind != "cpu":
        return ids
    angles = w.tokens * w.head_dim * 4
    return ids + {"none": 3 * 8 * w.tokens, "selective": 0.0, "full": angles}[recompute]


def head_bytes(w: Widths, kind: LayerKind) -> float:
    """Bytes that the last norm and the fused head keep: its input, that input's gradient, labels and statistics."""
    norm = w.rows * ((2 * 4 if kind == "cpu" else w.itemsize) * w.hidden + 4)
    return norm + 2 * w.rows * w.hidden * w.itemsize + w.tokens * (8 + 8 + 4 * _STATISTICS)


def head_chunk_bytes(settings: Settings, w: Widths, kind: LayerKind) -> float:
    """Bytes that the fused head holds only while it runs: a chunk of logits, gathered rows, their gradient."""
    place = "cpu" if kind == "cpu" else "gpu"
    arch, parallel = settings.architecture, settings.parallel
    words = padded_vocab_size(arch.vocab_size, settings.model.vocab_multiple) / parallel.tp
    chunk = min(float(HEAD_CHUNK_BYTES[place]), w.tokens * words * _HEAD_WORD_BYTES[place])
    gathered = w.tokens * w.hidden * (w.itemsize + 4) if parallel.sequence_parallel else 0.0
    return chunk + gathered


def backward_workspace(w: Widths, recipe: str = "none", *, transposes: bool = False) -> float:
    """Bytes of gradients in flight at the largest moment of one layer's backward pass.

    They are the gradients of gate, up and their product, and hidden states before and after. In FP8 a later moment may
    be larger: the gradient of gate and up is there, and quantised along rows and columns for the two products.

    Args:
        w: sizes.
        recipe: of FP8, or `none`.
        transposes: whether the device's products in FP8 need transposed copies.
    """
    hidden = 2.0 * w.hidden * w.itemsize
    moments = [3 * w.ffn * w.itemsize + hidden]
    if recipe != "none":
        quantised = copies(recipe, transposes=transposes) * number_bytes(recipe)
        moments.append(2 * w.ffn * (w.itemsize + quantised) + hidden)
    return w.tokens * max(moments)
