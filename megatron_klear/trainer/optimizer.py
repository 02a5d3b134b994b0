"""Megatron's data-parallel wrapper, distributed optimizer and learning rate schedule, from our settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_klear.config import OptimizerSettings, ParallelSettings
from megatron_klear.model import Qwen3Model
from megatron_klear.parallel import cuda_means_cpu


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainableModel:
    """A pipeline stage that can be trained.

    Attributes:
        model: the stage itself.
        ddp: the stage inside Megatron's data-parallel wrapper, which owns the gradient buffers.
        optimizer: Megatron's optimizer over them.
        schedule: sets learning rate and weight decay before every update.
    """

    model: Qwen3Model
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def make_trainable(
    model: Qwen3Model, settings: OptimizerSettings, parallel: ParallelSettings, *, total_updates: int
) -> TrainableModel:
    """Wrap a model for training.

    Gradients are summed over data and context parallel ranks, never averaged: the loss's denominators are
    global already. Norm weights and biases get no weight decay (Megatron's default for vectors).

    Args:
        model: this rank's stage, weights in place (float32 copies of them are taken here).
        settings: AdamW and schedule.
        parallel: layout.
        total_updates: optimizer updates of the whole run; the cosine schedule ends there.
    """
    bf16 = model.config.bf16
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # the trainer checks on all ranks together and names the sequences
        average_in_collective=False,
        fp8_param_gather=model.config.fp8_param,
    )
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr if settings.schedule == "cosine" else settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
    )
    with cuda_means_cpu():
        ddp = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
        ddp.broadcast_params()
        optimizer = get_megatron_optimizer(optimizer_config, [ddp])
    if parallel.overlap_param_gather:
        model.finish_update = partial(ddp.start_param_sync, force_sync=True)
    return TrainableModel(
        model=model, ddp=ddp, optimizer=optimizer, schedule=_schedule(optimizer, settings, total_updates)
    )


def _schedule(optimizer: MegatronOptimizer, settings: OptimizerSettings, total_updates: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then constant or cosine to `min_lr`.

    The trainer advances it *before* each update, so that update k of n runs at the rate of step k: the first is
    already above 0 and the last is exactly `min_lr`.
    """
    keywords: dict[str, Any] = {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": True}
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr if settings.schedule == "cosine" else settings.lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(total_updates, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        **keywords,
    )
