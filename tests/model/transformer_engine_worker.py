"""Builds and runs Qwen3 on the stand-in for Transformer Engine, beside our own layers; prints what it found as JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
_spec = importlib.util.spec_from_file_location("double", Path(__file__).with_name("transformer_engine_double.py"))
assert _spec is not None
assert _spec.loader is not None
double = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(double)
double.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_klear import parallel  # noqa: E402
from megatron_klear.config import Architecture, Fp8Settings, ModelSettings, ParallelSettings  # noqa: E402
from megatron_klear.config.yarn import Yarn  # noqa: E402
from megatron_klear.conformance.reference import reference_model  # noqa: E402
from megatron_klear.model import HeadRequest, build_qwen3, forward_microbatch, load_hf_weights, qwen3  # noqa: E402
from megatron_klear.packing import pack  # noqa: E402
from megatron_klear.records import TrainSequence  # noqa: E402

ARCH = Architecture(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16,
    vocab_size=61, max_position_embeddings=64, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, init_std=0.1,
)  # fmt: skip


def sequences() -> list[TrainSequence]:
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((9, 33, 2, 20)):
        zeros = np.zeros(length, dtype=np.float32)
        made.append(
            TrainSequence(
                sequence_id=str(number), token_ids=rng.integers(0, 61, length), policy_weight=zeros, lm_weight=zeros,
                advantages=zeros, old_logprobs=zeros, rollout_logprobs=zeros,
            )
        )  # fmt: skip
    return made


def run(kind: str, dtype: str, fp8: Fp8Settings | None = None, yarn: Yarn | None = None) -> tuple[Any, torch.Tensor]:
    """The model and the logprobs of one pack."""
    qwen3.pick_layer_spec = lambda model: kind  # there is no GPU, which it would ask for
    qwen3.fp8_problems = lambda settings, device: []
    settings = ModelSettings(**dataclasses.asdict(ARCH), dtype=dtype, vocab_multiple=8)
    model = build_qwen3(ARCH, settings, ParallelSettings(), context, fp8=fp8, yarn=yarn)
    load_hf_weights(model, ARCH, context, reference_model(ARCH).state_dict().__getitem__)
    batch = pack(sequences(), token_multiple=1 if fp8 is None else fp8.multiple)
    double.CALLS.clear()
    double.ATTENTION.clear()
    with torch.no_grad(), parallel.cuda_means_cpu():
        request = HeadRequest(batch=batch, objective=None)
        return model, forward_microbatch(model, request, context, transformer_engine=kind == "te").logprobs


context = parallel.start(ParallelSettings())
_, ours = run("local", "float32")
model, theirs = run("te", "float32")
scaled = Yarn(factor=2.5, original_positions=16)
layer = model.decoder.layers[0]
found: dict[str, Any] = {
    "difference": float((ours - theirs).abs().max()),
    "yarn_difference": float(
        (run("local", "float32", yarn=scaled)[1] - run("te", "float32", yarn=scaled)[1]).abs().max()
    ),
    "yarn_matters": float((run("te", "float32", yarn=scaled)[1] - ours).abs().max()),
    "scale": float(ours.abs().max()),
    "modules": {name: type(module).__name__ for name, module in model.named_modules() if name},
    "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
    "attention": double.ATTENTION[0],
    "attention_options": {
        name: layer.self_attention.core_attention.options[name]
        for name in ("num_attention_heads", "kv_channels", "num_gqa_groups", "attn_mask_type", "attention_dropout")
    },
    "eps": [layer.self_attention.q_layernorm.eps, layer.mlp.linear_fc1.eps],
    "recipes": {},
}
for name, fp8 in {
    "delayed": Fp8Settings(recipe="delayed", amax_history=7),
    "tensorwise": Fp8Settings(recipe="tensorwise", first_layers_bf16=1, last_layers_bf16=2),
    "blockwise": Fp8Settings(recipe="blockwise"),
}.items():
    model, logprobs = run("te", "bfloat16", fp8)
    names = {module: path for path, module in model.named_modules()}
    linear = [path for path, module in model.named_modules() if isinstance(module, double.Linear)]
    recipe = next(recipe for _, recipe in double.CALLS if recipe is not None)
    found["recipes"][name] = {
        "ran": double.recipes_of(linear, names),
        "options": {key: str(value) for key, value in recipe.options.items()},
        "head": [type(model.output_layer).__name__, str(model.output_layer.weight.dtype)],
        "tokens": len(logprobs),
    }
parallel.stop()
json.dump(found, sys.stdout)
