"""The two layer specs of Qwen3: Transformer Engine's modules, or Megatron's own with our packed attention."""

from __future__ import annotations

import importlib.metadata

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klear.config import ModelSettings
from megatron_klear.errors import ConfigError
from megatron_klear.model.attention import PackedAttention, pick_backend
from megatron_klear.model.norm import RMSNorm


def transformer_engine_is_there() -> bool:
    """Whether Transformer Engine can be imported (it cannot on a machine without CUDA)."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def pick_layer_spec(model: ModelSettings) -> str:
    """`te` or `local` for the settings `model.layer_spec`, `model.attention` and `model.dtype`.

    `auto` means Transformer Engine where it is installed and a GPU is used, unless another attention was asked for
    by name, or the model is float32, which its fused attention does not compute.

    Raises:
        ConfigError: Transformer Engine was asked for and is not there.
    """
    asked = {f"model.{name}": getattr(model, name) for name in ("layer_spec", "attention")}
    asked = {path: value for path, value in asked.items() if value in ("te", "cudnn")}
    if not asked and (model.layer_spec == "local" or model.attention != "auto" or model.dtype == "float32"):
        return "local"
    there = torch.cuda.is_available() and transformer_engine_is_there()
    if asked and not there:
        raise ConfigError(
            [
                f"{path}: {value} was asked for but transformer_engine or a GPU is missing; use auto"
                for path, value in asked.items()
            ]
        )
    return "te" if there else "local"


def attention_backend(model: ModelSettings) -> AttnBackend:
    """Which of its attentions Transformer Engine may use; Megatron tells it by environment variables."""
    named = {"flash": AttnBackend.flash, "cudnn": AttnBackend.fused}
    return named.get(model.attention, AttnBackend.auto)


def describe_attention(model: ModelSettings, kind: str, device: torch.device) -> str:
    """What computes attention, for people.

    Args:
        model: `attention` and `dtype`.
        kind: `te` or `local`, from `pick_layer_spec`.
        device: where.
    """
    if kind == "local":
        dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
        backend = pick_backend(model.attention, device, dtype)
        return f"flash-attn {_version('flash-attn')}" if backend == "flash" else "torch SDPA"
    if model.attention == "cudnn":
        return f"cuDNN {_cudnn()} in Transformer Engine {_version('transformer-engine')}"
    if model.attention == "flash":
        return f"flash-attn {_version('flash-attn')} in Transformer Engine {_version('transformer-engine')}"
    return (
        f"Transformer Engine {_version('transformer-engine')}'s choice of cuDNN {_cudnn()} and flash-attn "
        f"{_version('flash-attn')}"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _cudnn() -> str:
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return "(not there)" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


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
