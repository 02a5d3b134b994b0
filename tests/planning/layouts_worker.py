"""One of four gloo processes of test_against_megatron.py: real models in many layouts, measured.

Arguments: rank, port, working directory with `jobs.json`. What was measured goes to `rank<rank>.json`.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

sent: dict[Any, float] = defaultdict(float)
"""Bytes that this rank has sent, by process group, each collective counted as a ring sends it."""
_inside = threading.local()


def _counting(name: str, argument: str, rounds: float | None) -> None:
    """Replace one of torch's collectives by one that counts.

    Args:
        name: of the function.
        argument: whose bytes are the whole that is sent.
        rounds: how often a ring of p ranks sends (p - 1) / p of it; None for a message from one rank to another.
    """
    original = getattr(dist, name)
    signature = inspect.signature(original)

    def counted(*args: Any, **keywords: Any) -> Any:
        given = signature.bind(*args, **keywords).arguments
        size = dist.get_world_size(given.get("group"))
        share = 1.0 if rounds is None else rounds * (size - 1) / size
        outermost = not getattr(_inside, "collective", False)
        if outermost:  # one is made of another, or calls itself again under a torch function mode
            sent[given.get("group")] += share * given[argument].nbytes
        _inside.collective = True
        try:
            return original(*args, **keywords)
        finally:
            _inside.collective = not outermost

    setattr(dist, name, counted)
    setattr(dist.distributed_c10d, name, counted)  # which takes a batch of sends for one by this name


def _count_collectives() -> None:
    """Before Megatron takes hold of them."""
    _counting("all_reduce", "tensor", 2.0)
    _counting("all_gather_into_tensor", "output_tensor", 1.0)
    _counting("_all_gather_base", "output_tensor", 1.0)
    _counting("reduce_scatter_tensor", "input", 1.0)
    _counting("_reduce_scatter_base", "input", 1.0)
    if hasattr(dist, "all_gather_single"):  # newer names of torch
        _counting("all_gather_single", "output_tensor", 1.0)
        _counting("reduce_scatter_single", "input", 1.0)
    _counting("isend", "tensor", None)
    _counting("send", "tensor", None)


_count_collectives()

from megatron.core.distributed import distributed_data_parallel, param_and_grad_buffer  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402

from megatron_klear import parallel  # noqa: E402
from megatron_klear.algorithm import PolicyObjective  # noqa: E402
from megatron_klear.config import (  # noqa: E402
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.model import HeadRequest, build_qwen3, forward_microbatch  # noqa: E402
from megatron_klear.packing import pack  # noqa: E402
from megatron_klear.records import ParallelContext, TrainSequence  # noqa: E402
from megatron_klear.trainer import Trainer, make_trainable  # noqa: E402
from megatron_klear.trainer.optimizer import TrainableModel  # noqa: E402


def quantise(model_params: list[Any], main_params: Any, start_offsets: Any, group: Any) -> None:
    """What Transformer Engine sends when it quantises updated weights with a scale each: their largest values."""
    dist.all_reduce(torch.zeros(len(model_params)), op=dist.ReduceOp.MAX, group=group)


@contextmanager
def stored_in_fp8(model: torch.nn.Module, stage: int, kept: tuple[int, int]) -> Iterator[None]:
    """Have Megatron take the matrices of a model's layers for tensors of Transformer Engine in FP8, one byte a number.

    Args:
        model: in bfloat16.
        stage: pipeline stage.
        kept: layers at the start and at the end of the whole model that are not.
    """
    layers = model.decoder.layers  # type: ignore[union-attr]
    total = layers[0].config.num_layers
    chosen = {
        id(module.weight)
        for number, layer in enumerate(layers, start=stage * len(layers))
        if kept[0] <= number < total - kept[1]
        for module in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj,
                       layer.mlp.linear_fc1, layer.mlp.linear_fc2)
    }  # fmt: skip

    with ExitStack() as patched:
        for module in (distributed_data_parallel, param_and_grad_buffer, distrib_optimizer):
            patched.enter_context(mock.patch.object(module, "is_float8tensor", lambda tensor: id(tensor) in chosen))
        # Their values stay where they are: only the buffers' sizes and what is sent of them count here.
        patched.enter_context(mock.patch.object(param_and_grad_buffer, "modify_underlying_storage"))
        patched.enter_context(mock.patch.object(distrib_optimizer, "quantize_param_shard", quantise))
        yield


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of whole storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state(trainable: TrainableModel, dtype: str) -> dict[str, int]:
    """Bytes that stay after an update."""
    weights = list(trainable.model.parameters())
    gradients = [buffer.grad_data for buffer in trainable.ddp.buffers]
    inner = trainable.optimizer.optimizer
    moments = [t for values in inner.state.values() for name, t in values.items() if name != "step"]
    held = [p for group in inner.param_groups for p in group["params"]]
    own = {t.untyped_storage().data_ptr() for t in weights}
    copies = [p for p in held if p.untyped_storage().data_ptr() not in own]
    assert bool(copies) == (dtype == "bfloat16" and bool(held))
    assert all(t.dtype == torch.float32 for t in [*moments, *copies])
    return {
        "weights": storages(weights),
        "gradients": storages(gradients),
        "optimizer": numbers([*moments, *copies]),
    }


def sequences(settings: Settings, count: int) -> list[TrainSequence]:
    """Sequences that each fill a microbatch, the same on every rank."""
    rng, length = np.random.default_rng(0), settings.packing.token_budget
    zeros, trained = np.zeros(length, dtype=np.float32), np.full(length, 1e-3, dtype=np.float32)
    trained[0] = 0.0
    return [
        TrainSequence(
            sequence_id=f"s{number}",
            token_ids=rng.integers(0, settings.architecture.vocab_size, length),
            policy_weight=zeros,
            lm_weight=trained,
            advantages=zeros,
            old_logprobs=zeros,
            rollout_logprobs=zeros,
        )
        for number in range(count)
    ]


def traffic(trainer: Trainer, microbatches: int) -> dict[str, float]:
    """Bytes sent in one update, by what the process group is for."""
    context = trainer.context
    sent.clear()
    trainer.update(
        sequences(trainer.settings, microbatches * context.dp.size),
        PolicyObjective(),
        step=1,
    )
    named = {"tensor": context.tp, "context": context.cp, "pipeline": context.pp, "data": context.dp_cp}
    found = {name: sent.pop(axis.group, 0.0) for name, axis in named.items() if axis.size > 1}
    found["rest"] = sum(sent.values())
    return found


def kept(trainable: TrainableModel, settings: Settings, context: ParallelContext) -> int:
    """Bytes of all storages that the forward pass of one microbatch keeps, those of parameters left out."""
    batch = pack(
        sequences(settings, 1),
        cp_rank=context.cp.rank,
        cp_size=context.cp.size,
        tp_size=context.tp.size if settings.parallel.sequence_parallel else 1,
        device=context.device,
    )
    weights = {p.untyped_storage().data_ptr() for p in trainable.model.parameters()}
    found: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    request = HeadRequest(batch=batch, objective=PolicyObjective())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), parallel.cuda_means_cpu():
        forward_microbatch(trainable.ddp, request, context, transformer_engine=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def run(job: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    settings = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(**job["model"]),
        parallel=ParallelSettings(**job["parallel"]),
        packing=PackingSettings(token_budget=job["token_budget"]),
        optimizer=OptimizerSettings(lr=1e-3),
    )
    model = build_qwen3(settings.architecture, settings.model, settings.parallel, context)
    with stored_in_fp8(model, context.pp.rank, job["kept_bf16"]) if job["kept_bf16"] else nullcontext():
        return measured(model, settings, context, job)


def measured(model: Any, settings: Settings, context: ParallelContext, job: dict[str, Any]) -> dict[str, Any]:
    trainable = make_trainable(model, settings.optimizer, settings.parallel, total_updates=2)
    trainer = Trainer(trainable, settings.architecture, settings, context)
    found: dict[str, Any] = {"stage": context.pp.rank, "shard": context.dp_cp.rank, "dp": context.dp.size}
    if job["microbatches"]:
        found["traffic"] = traffic(trainer, job["microbatches"])
        if context.pp.size == 1:
            found["kept"] = kept(trainable, settings, context)
    else:
        with parallel.cuda_means_cpu():
            for parameter in model.parameters():
                parameter.main_grad.normal_()
            trainable.optimizer.prepare_grads()
            trainable.optimizer.step()
    held = state(trainable, settings.model.dtype)
    if job["kept_bf16"]:
        held["weights"] = storages(buffer.param_data for buffer in trainable.ddp.buffers)
    return {**found, **held}


def main() -> None:
    rank, port, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    jobs = json.loads((directory / "jobs.json").read_text())
    os.environ |= {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, job in jobs.items():
        context = parallel.start(ParallelSettings(**job["parallel"], timeout_seconds=60.0))
        found[name] = run(job, context)
        parallel.reset_layout()
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    parallel.stop()


if __name__ == "__main__":
    main()
