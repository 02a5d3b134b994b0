"""Run by SGLang's Python: the cosines and sines that its Qwen3 takes from the config in a directory."""

from __future__ import annotations

import os
import sys

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import torch
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1])
set_global_server_args_for_scheduler(ServerArgs(model_path=sys.argv[1], device="cpu"))
rope = get_rope(
    config.head_dim,
    rotary_dim=config.head_dim,
    max_position=config.max_position_embeddings,
    base=config.rope_parameters["rope_theta"],
    rope_scaling=config.rope_parameters,
    dtype=torch.float32,
)
torch.save(rope.cos_sin_cache[:: int(sys.argv[3])].clone(), sys.argv[2])
