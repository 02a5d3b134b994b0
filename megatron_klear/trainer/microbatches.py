"""Runs packed microbatches through Megatron's pipeline schedules, with a loss that is a plain sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_klear.algorithm import PolicyObjective
from megatron_klear.model import HeadRequest, HeadResult, forward_microbatch
from megatron_klear.observe import nvtx_range
from megatron_klear.parallel import cuda_means_cpu
from megatron_klear.records import PackedBatch, ParallelContext
from megatron_klear.trainer.optimizer import TrainableModel


def run_microbatches(
    trainable: TrainableModel,
    packs: Sequence[PackedBatch],
    objective: PolicyObjective | None,
    context: ParallelContext,
    *,
    temperature: float,
) -> list[HeadResult]:
    """Forward all microbatches, and with an objective also backward, leaving summed gradients in the buffers.

    Every data-parallel rank must bring the same number of microbatches. No scaling happens here or in Megatron:
    with `calculate_per_token_loss` and no token count the schedules neither divide by microbatches nor average
    over ranks, so the gradient is that of the sum of `HeadResult.loss` over microbatches and ranks.

    Args:
        trainable: the stage.
        packs: this rank's microbatches.
        objective: the policy loss; None for logprobs only, without gradient.
        context: the layout.
        temperature: sampling temperature that logprobs are defined under.

    Returns:
        One result per microbatch, detached, on the last pipeline stage; an empty list on the others.
    """
    config = trainable.ddp.module.config
    config.finalize_model_grads_func = _finalize_without_token_count
    config.no_sync_func = trainable.ddp.no_sync
    step = partial(
        _forward_step,
        context=context,
        objective=objective,
        temperature=temperature,
        transformer_engine=trainable.model.layer_kind == "te",
    )
    if trainable.model.ranges is not None:
        trainable.model.ranges.restart()
    training = objective is not None
    with cuda_means_cpu(), torch.set_grad_enabled(training):
        results: list[HeadResult] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=enumerate(packs),
            model=[trainable.ddp],
            num_microbatches=len(packs),
            seq_length=packs[0].token_ids.numel(),
            micro_batch_size=1,
            forward_only=not training,
        )
    return results


def _forward_step(
    packs: Iterator[tuple[int, PackedBatch]],
    model: Callable[..., Any],
    *,
    context: ParallelContext,
    objective: PolicyObjective | None,
    temperature: float,
    transformer_engine: bool,
) -> tuple[torch.Tensor | HeadResult, Callable[[HeadResult], tuple[torch.Tensor, torch.Tensor, HeadResult]]]:
    number, batch = next(packs)
    request = HeadRequest(batch=batch, objective=objective, temperature=temperature)
    with nvtx_range(f"microbatch {number} forward"):
        return forward_microbatch(model, request, context, transformer_engine=transformer_engine), _loss_of


def _loss_of(result: HeadResult) -> tuple[torch.Tensor, torch.Tensor, HeadResult]:
    """Megatron's (loss, token count, data to keep); the count is unused since denominators are folded in."""
    return result.loss, torch.zeros((), dtype=torch.int), result._replace(loss=result.loss.detach())


def _finalize_without_token_count(model: list[torch.nn.Module], num_tokens: object = None, **keywords: Any) -> None:
    """Megatron's reduction of gradients over ranks, without its division by a token count."""
    finalize_model_grads(model, None, **keywords)
