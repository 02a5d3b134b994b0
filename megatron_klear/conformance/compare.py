"""One layout against the float64 reference, inside the group of processes that this rank belongs to.

Errors are judged against what the data type costs: the same computation by transformers in the layout's data type, one
process, no packing, differs from float64 by some amount; a layout may differ by `SLACK` times that.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_klear import parallel
from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import (
    Architecture,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TokenizerSettings,
)
from megatron_klear.conformance.matrix import Comparison, Layout
from megatron_klear.conformance.reference import (
    ReferenceResult,
    all_logprobs,
    reference_model,
    reference_sequences,
    train_reference,
    with_old_logprobs,
)
from megatron_klear.model import build_qwen3, hf_named_tensors, load_hf_weights
from megatron_klear.records import ParallelContext, TrainSequence
from megatron_klear.trainer import TrainableModel, Trainer, make_trainable

OPTIMIZER = OptimizerSettings(lr=1e-2, weight_decay=0.1, adam_eps=1e-3, clip_grad=0.5, warmup_steps=0)
"""A large epsilon keeps the first Adam step a smooth function of the gradient, so that errors stay comparable.

The gradient's norm is above `clip_grad`, so clipping takes part.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What a layout starts from and what must come of it.

    Attributes:
        weights: float32, by Hugging Face name.
        sequences: to train on.
        exact: the result in float64.
        plain: the result in the layout's data type.
    """

    weights: dict[str, torch.Tensor]
    sequences: list[TrainSequence]
    exact: ReferenceResult
    plain: ReferenceResult


def architecture(tied: bool) -> Architecture:
    """A small Qwen3 whose sizes divide in every layout; its vocabulary needs padding."""
    return Architecture(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=8,
        vocab_size=83,
        max_position_embeddings=128,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
        init_std=0.02,
    )


def objective_of(layout: Layout) -> PolicyObjective:
    """The policy loss that a layout is compared with."""
    return PolicyObjective(kind=layout.objective, epsilon_low=0.2, epsilon_high=0.28)


class References:
    """References, computed once each, by rank 0 for all."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Reference] = {}

    def get(self, layout: Layout) -> Reference:
        """What a layout is compared with; a collective of all ranks, if there are several."""
        key = (
            layout.kind,
            layout.objective,
            layout.temperature,
            layout.tied,
            layout.lengths,
            layout.dtype,
            layout.updates,
        )
        if key not in self._known:
            shared: list[Reference | None] = [None]
            if not dist.is_initialized() or dist.get_rank() == 0:
                shared = [compute_reference(layout)]
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast_object_list(shared)
            assert shared[0] is not None
            self._known[key] = shared[0]
        return self._known[key]


def compute_reference(layout: Layout) -> Reference:
    """Random weights, sequences whose ratios lie in all clip regions, and both results."""
    arch, objective = architecture(layout.tied), objective_of(layout)
    sequences = reference_sequences(arch, layout.lengths, kind=layout.kind)
    weights = {name: tensor.clone() for name, tensor in reference_model(arch).state_dict().items()}
    exact_model = reference_model(arch).double()
    sequences = with_old_logprobs(sequences, all_logprobs(exact_model, sequences, layout.temperature))
    plain_model = reference_model(arch).to(getattr(torch, layout.dtype))
    exact, plain = (
        train_reference(model, sequences, objective, OPTIMIZER, temperature=layout.temperature, updates=layout.updates)
        for model in (exact_model, plain_model)
    )
    return Reference(weights=weights, sequences=sequences, exact=exact, plain=plain)


def parallel_settings(layout: Layout, timeout_seconds: float) -> ParallelSettings:
    """The layout as settings."""
    return ParallelSettings(
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        timeout_seconds=timeout_seconds,
    )


def layout_trainer(
    layout: Layout, sizes: ParallelSettings, context: ParallelContext, weights: Mapping[str, torch.Tensor]
) -> Trainer:
    """A trainer in a layout, starting from the given weights."""
    arch = architecture(layout.tied)
    model_settings = ModelSettings(
        **asdict(arch),
        dtype=layout.dtype,
        recompute=layout.recompute,
        layer_spec=layout.layer_spec,
        vocab_multiple=16,
    )
    settings = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=model_settings,
        parallel=sizes,
        packing=PackingSettings(token_budget=layout.token_budget),
    )
    model = build_qwen3(arch, model_settings, sizes, context)
    load_hf_weights(model, arch, context, weights.__getitem__)
    return Trainer(make_trainable(model, OPTIMIZER, sizes, total_updates=10), arch, settings, context)


def compare_layout(
    layout: Layout, references: References, *, device: str = "auto", timeout_seconds: float = 120.0
) -> Comparison:
    """Run one layout on the processes of this launch; every rank calls it and gets the same answer.

    Args:
        layout: what to run.
        references: kept by the caller from layout to layout.
        device: as `parallel.start` takes it.
        timeout_seconds: how long a collective waits for a missing rank.
    """
    began = time.monotonic()
    sizes = parallel_settings(layout, timeout_seconds)
    context = parallel.start(sizes, device=device)
    reference = references.get(layout)
    trainer = layout_trainer(layout, sizes, context, reference.weights)
    comparison = _compare(layout, trainer, reference, began)
    del trainer, context
    gc.collect()  # models refer to themselves in circles and would keep the layout's groups alive, threads and all
    parallel.reset_layout()
    return comparison


def _compare(layout: Layout, trainer: Trainer, reference: Reference, began: float) -> Comparison:
    sequences, exact, plain, context = reference.sequences, reference.exact, reference.plain, trainer.context
    for step in range(1, layout.updates + 1):
        before = trainer.token_logprobs(sequences, temperature=layout.temperature)
        report = trainer.update(sequences, objective_of(layout), step=step, temperature=layout.temperature)
    updated = dict(hf_named_tensors(trainer.trainable.model, trainer.arch, context))
    grads = _gradients(trainer, report.grad_norm)
    after = trainer.token_logprobs(sequences, temperature=layout.temperature)
    eps = torch.finfo(getattr(torch, layout.dtype)).eps
    return Comparison(
        label=layout.label(context.world.size),
        processes=context.world.size,
        device=context.device.type,
        loss=_error(report.loss, exact.loss, plain.loss, eps * exact.loss_terms),
        logprobs=max(
            _worst(enumerate(before), dict(enumerate(exact.logprobs)), dict(enumerate(plain.logprobs)), eps),
            _worst(enumerate(after), dict(enumerate(exact.logprobs_after)), dict(enumerate(plain.logprobs_after)), eps),
        ),
        grads=_worst(grads.items(), exact.grads, plain.grads, eps),
        grad_norm=_error(report.grad_norm, exact.grad_norm, plain.grad_norm, eps * exact.grad_norm),
        updated=_worst(updated.items(), exact.updated, plain.updated, eps),
        seconds=time.monotonic() - began,
    )


def _gradients(trainer: Trainer, grad_norm: float) -> dict[str, torch.Tensor]:
    """Gradients by Hugging Face name as the backward pass left them, whole on every rank."""
    _gather_gradients(trainer.trainable, trainer.context)
    # The update clipped the gradient in place (with 1e-6 for safety, as torch does); undo it.
    unclip = max((grad_norm + 1e-6) / OPTIMIZER.clip_grad, 1.0)
    named = hf_named_tensors(trainer.trainable.model, trainer.arch, trainer.context, of=_main_grad)
    return {name: gradient.double() * unclip for name, gradient in named}


def _main_grad(parameter: Any) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad  # Megatron hangs it on every parameter
    return gradient


def _gather_gradients(trainable: TrainableModel, context: ParallelContext) -> None:
    """Complete the gradient buffers: with the distributed optimizer each rank has summed only its own share."""
    if not trainable.ddp.ddp_config.use_distributed_optimizer:
        return
    axis = context.dp_cp
    for buffer in trainable.ddp.buffers:
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(axis.size)[axis.rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=axis.group)


def _worst(found: Iterable[tuple[Any, Any]], exact: Mapping[Any, Any], plain: Mapping[Any, Any], eps: float) -> float:
    """Worst error of several arrays: norm of the error over the norm of the reference's own, NaN if there is one."""
    arrays = {name: _array(values) for name, values in found}
    if set(exact) - set(arrays):
        raise AssertionError(f"tensors that the layout did not give: {sorted(set(exact) - set(arrays))}")
    errors = []
    for name, values in exact.items():
        wanted = _array(values)
        # No computation in this data type can promise better than half a unit in the last place of every entry.
        unit = max(float(np.linalg.norm(_array(plain[name]) - wanted)), eps / 2 * float(np.linalg.norm(wanted)))
        errors.append(float(np.linalg.norm(arrays[name] - wanted)) / max(unit, 1e-30))
    return float(np.max(errors))


def _array(values: Any) -> np.ndarray:
    return (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )


def _error(found: float, exact: float, plain: float, floor: float) -> float:
    return abs(found - exact) / max(abs(plain - exact), floor, 1e-30)
