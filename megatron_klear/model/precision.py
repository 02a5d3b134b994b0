"""FP8 on this machine: the settings as Megatron's own fields, what the hardware refuses, and weights stored in FP8."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.enums import AttnBackend

from megatron_klear.config import Fp8Settings, Settings
from megatron_klear.errors import ConfigError
from megatron_klear.model.layer_spec import attention_backend, pick_layer_spec, transformer_engine_is_there

_CAPABILITY = (8, 9)
_BLOCKWISE_CAPABILITY, _BLOCKWISE_CUDA = (9, 0), (12, 9)


def megatron_fp8_fields(fp8: Fp8Settings) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for these settings; none without a recipe."""
    if not fp8.on:
        return {}
    return {
        # Blocks have a scale each, so that gradients fit E4M3 too; whole tensors of gradients need E5M2's range.
        "fp8": "e4m3" if fp8.recipe == "blockwise" else "hybrid",
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        "fp8_amax_history_len": fp8.amax_history if fp8.recipe == "delayed" else 1,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def fp8_problems(fp8: Fp8Settings, device: torch.device) -> list[str]:
    """Why FP8 cannot be computed here, as `path: text`; empty when it can, or is not asked for."""
    if not fp8.on:
        return []
    asked = f"fp8.recipe: got {fp8.recipe}, which needs"
    if device.type != "cuda":
        return [f"{asked} a GPU of compute capability 8.9 or above, and there is none; set fp8.recipe=none"]
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return [f"{asked} compute capability 8.9 or above, and {name} has {_version(capability)}; set fp8.recipe=none"]
    if not transformer_engine_is_there():
        return [f"{asked} Transformer Engine, which is not installed here; set fp8.recipe=none"]
    if fp8.recipe == "blockwise":
        cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
        if capability < _BLOCKWISE_CAPABILITY or cuda < _BLOCKWISE_CUDA:
            return [
                f"{asked} compute capability 9.0 and CUDA 12.9 or above, and this is {name} "
                f"({_version(capability)}) with CUDA {_version(cuda)}; set fp8.recipe=tensorwise"
            ]
    return []


def require_hardware(settings: Settings) -> None:
    """Refuse settings that this machine cannot compute, before data is read or a model built.

    Raises:
        ConfigError: with every problem found.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = fp8_problems(settings.fp8, device)
    kind = ""
    try:
        kind = pick_layer_spec(settings.model)
    except ConfigError as error:
        problems += error.problems
    if settings.model.attention == "flash":
        if device.type != "cuda":
            problems.append("model.attention: got flash, which needs a GPU, and there is none; set auto or sdpa")
        elif importlib.util.find_spec("flash_attn") is None:
            problems.append("model.attention: got flash, and flash-attn is not installed; set auto, cudnn or sdpa")
    if settings.profile.tool == "nsys" and device.type != "cuda":
        problems.append("profile.tool: got nsys, which records a GPU, and there is none; set torch")
    if kind == "te":
        problems += _environment_problems(settings)
    if problems:
        raise ConfigError(problems)


def _environment_problems(settings: Settings) -> list[str]:
    """Environment variables that contradict the settings: Megatron sets them, and fails an assertion over others."""
    backend = attention_backend(settings.model)
    wanted = {
        "NVTE_FLASH_ATTN": backend in (AttnBackend.flash, AttnBackend.auto),
        "NVTE_FUSED_ATTN": backend in (AttnBackend.fused, AttnBackend.auto),
        "NVTE_UNFUSED_ATTN": backend is AttnBackend.auto,
    }
    return [
        f"model.attention: got {settings.model.attention}, and the environment has {name}={os.environ[name]}; unset it"
        for name, value in wanted.items()
        if os.environ.get(name, str(int(value))) != str(int(value))
    ]


def _version(parts: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in parts)


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """A weight as an ordinary tensor: one that is stored in FP8 as the values that products are computed with."""
    if is_float8tensor(parameter):
        values: torch.Tensor = dequantize_fp8_tensor(parameter)
        return values
    return parameter


def note_loaded(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Have the optimizer start from the values that were loaded, where a weight is stored in FP8.

    Such a weight remembers the numbers that it was initialised with, for the optimizer's float32 copy. Left as they
    are, the first update would bring back the random initialisation; from FP8 itself, three bits of mantissa.
    """
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = values.detach().to("cpu", torch.bfloat16).clone()  # type: ignore[attr-defined]
