"""The two layer specs of Qwen3: Transformer Engine's modules, or Megatron's own with our packed attention."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klear.errors import ConfigError
from megatron_klear.model.attention import PackedAttention
from megatron_klear.model.norm import RMSNorm


def transformer_engine_is_there() -> bool:
    """Whether Transformer Engine can be imported (it cannot on a machine without CUDA)."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def pick_layer_spec(setting: str) -> str:
    """`te` or `local` for a `model.layer_spec` of auto, te or local.

    Raises:
        ConfigError: Transformer Engine was asked for and is not there.
    """
    if setting == "local":
        return "local"
    there = transformer_engine_is_there()
    if setting == "te" and not there:
        raise ConfigError(
            ["model.layer_spec: te was asked for but transformer_engine cannot be imported; install it or use auto"]
        )
    return "te" if there else "local"


def block_spec(config: TransformerConfig, kind: str) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of this pipeline stage.

    Args:
        config: Megatron's configuration of the model.
        kind: `te` or `local`, from `pick_layer_spec`.
    """
    if kind == "te":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = RMSNorm
    attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config),
        layer_norm=RMSNorm,
    )
