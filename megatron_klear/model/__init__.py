"""Qwen3 on Megatron-Core with the fused head, and its Hugging Face names."""

from megatron_klear.model.hf_config import hf_config
from megatron_klear.model.hf_stream import HfWeights, hf_named_tensors, load_hf_weights, open_hf_directory
from megatron_klear.model.qwen3 import HeadRequest, HeadResult, Qwen3Model, build_qwen3, forward_microbatch

__all__ = [
    "HeadRequest",
    "HeadResult",
    "HfWeights",
    "Qwen3Model",
    "build_qwen3",
    "forward_microbatch",
    "hf_config",
    "hf_named_tensors",
    "load_hf_weights",
    "open_hf_directory",
]
