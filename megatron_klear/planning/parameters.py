"""The parameters that one rank holds, in the order in which Megatron registers them: it decides how buffers are padded.

Registration order and shapes are those of Megatron-Core 0.16.1's GPTModel with the layers of `model.layer_spec=local`.
Transformer Engine registers two norms elsewhere; as every size of a real model is a multiple of 64, its buffers come
out the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klear.config import Architecture, Settings, padded_vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A weight as one rank holds it.

    Attributes:
        name: Megatron's, layers numbered over the stage.
        numel: its numbers.
        tied_across_stages: whether another pipeline stage holds a copy (tied embeddings); it has a bucket of its own.
        fp8_shape: rows and columns as this rank holds them, of a matrix whose products are computed in FP8; else None.
    """

    name: str
    numel: int
    tied_across_stages: bool = False
    fp8_shape: tuple[int, int] | None = None


def stage_layers(settings: Settings) -> int:
    """Layers of each pipeline stage; stages are equal."""
    return settings.architecture.num_layers // settings.parallel.pp


def fp8_layers(settings: Settings, stage: int) -> list[bool]:
    """Of each layer of a pipeline stage, whether its products are computed in FP8."""
    fp8, layers = settings.fp8, stage_layers(settings)
    if not fp8.on:
        return [False] * layers
    end = settings.architecture.num_layers - fp8.last_layers_bf16
    return [fp8.first_layers_bf16 <= stage * layers + layer < end for layer in range(layers)]


def stage_parameters(settings: Settings, stage: int) -> list[Parameter]:
    """Weights of a rank of one pipeline stage.

    Args:
        settings: settings whose sizes are filled in and divide.
        stage: from 0.
    """
    arch, parallel = settings.architecture, settings.parallel
    first, last = stage == 0, stage == parallel.pp - 1
    tied, spread = arch.tie_embeddings, parallel.pp > 1
    words = padded_vocab_size(arch.vocab_size, settings.model.vocab_multiple) * arch.hidden_size // parallel.tp
    found = []
    if first:
        found.append(
            Parameter(name="embedding.word_embeddings.weight", numel=words, tied_across_stages=tied and spread)
        )
    shapes = _layer_shapes(arch, parallel.tp)
    for layer, in_fp8 in enumerate(fp8_layers(settings, stage)):
        for name, (rows, columns) in shapes.items():
            shape = (rows, columns) if in_fp8 and ".linear_" in name else None
            full_name = f"decoder.layers.{layer}.{name}.weight"
            found.append(Parameter(name=full_name, numel=rows * columns, fp8_shape=shape))
    if last:
        found.append(Parameter(name="decoder.final_layernorm.weight", numel=arch.hidden_size))
        if spread or not tied:
            found.append(Parameter(name="output_layer.weight", numel=words, tied_across_stages=tied and spread))
    return found


def _layer_shapes(arch: Architecture, tp: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of each weight of a layer as a rank holds it; a vector is one row."""
    queries, groups = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    return {
        "input_layernorm": (1, hidden),
        "self_attention.linear_proj": (hidden, queries // tp),
        "self_attention.linear_qkv": ((queries + 2 * groups) // tp, hidden),
        "self_attention.q_layernorm": (1, arch.head_dim),
        "self_attention.k_layernorm": (1, arch.head_dim),
        "pre_mlp_layernorm": (1, hidden),
        "mlp.linear_fc1": (2 * ffn // tp, hidden),
        "mlp.linear_fc2": (hidden, ffn // tp),
    }
