"""Bytes that a rank sends in one step, by what they are for, and over which links.

Collectives are counted as rings send them: an all-gather or reduce-scatter of n bytes over p ranks sends
(p - 1) / p * n from each, an all-reduce twice that. Ranks are placed as Megatron does, tensor parallel neighbours
first, then context, data and pipeline parallel; a group that fits into a node talks inside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klear.config import Settings
from megatron_klear.planning.activations import LayerKind, Widths, widths
from megatron_klear.planning.devices import Device
from megatron_klear.planning.fp8 import copies, largest_values_bytes, number_bytes
from megatron_klear.planning.memory import rank_buffers
from megatron_klear.planning.parameters import fp8_layers, stage_layers, stage_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How often one microbatch goes through a stage.

    Attributes:
        forward: forward passes.
        again: forward passes of layers that are computed again in the backward pass.
        backward: backward passes.
    """

    forward: float
    again: float
    backward: float


SCORING = Passes(forward=1.0, again=0.0, backward=0.0)
"""Of a microbatch whose logprobs are computed without gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that the busiest rank sends in one step.

    Attributes:
        tensor: hidden states over tensor parallel ranks, sequence parallel's included; `sequence` tells its part.
        sequence: the part of `tensor` that gathers and scatters tokens.
        context: keys, values and their gradients.
        pipeline: hidden states and their gradients between stages.
        data: gradients and updated weights.
        publish: weights to rollout engines over links or network, from the rank that sends them.
    """

    tensor: float
    sequence: float
    context: float
    pipeline: float
    data: float
    publish: float


def ring(ranks: int) -> float:
    """Share of the whole that each rank of a ring sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def link_rate(device: Device, span: int) -> float:
    """Bytes per second between ranks of a group that reaches over `span` consecutive ranks."""
    return device.link_rate if span <= device.per_node else device.network_rate


def spread_rate(device: Device, span: int, stride: int) -> float:
    """Bytes per second that a ring of every `stride`-th rank over `span` consecutive ranks sends between two of them.

    A node has one network adapter per device, and a group with several ranks in a node crosses its boundary over the
    adapters of all of them: NCCL lays a ring for each. That is taken for granted, not measured.
    """
    if span <= device.per_node:
        return device.link_rate
    return min(device.link_rate, device.network_rate * max(1, device.per_node // stride))


def tensor_bytes(settings: Settings, w: Widths, passes: Passes, stage: int) -> float:
    """Bytes for tensor parallelism of one microbatch: two pairs of products per layer, and the vocabulary's ends.

    Without sequence parallelism each pair ends in an all-reduce of the hidden states, forward and backward. With it the
    all-reduce is split in two, and the backward pass gathers the input of the first product once more. Embeddings are
    summed over shards of the vocabulary; the head sums the gradient of its input in float32.

    In FP8 what is gathered is quantised before, along rows or columns, but gradients in blocks along both; sums stay in
    bfloat16 (Transformer Engine 2.14.1, `gather_along_first_dim`).
    """
    parallel = settings.parallel
    first, last = stage == 0, stage == parallel.pp - 1
    if parallel.tp == 1:
        return 0.0
    hidden = w.tokens * w.hidden * w.itemsize * ring(parallel.tp)
    wide = hidden * 4 / w.itemsize
    forward, backward = passes.forward + passes.again, passes.backward
    if parallel.sequence_parallel:
        in_fp8, recipe = sum(fp8_layers(settings, stage)), settings.fp8.recipe
        inputs = gradients = 1.0  # of what bfloat16 sends
        if in_fp8:
            inputs = number_bytes(recipe) / w.itemsize
            gradients = inputs * copies(recipe, transposes=False)
        others = (stage_layers(settings) - in_fp8) * (2 * forward + 3 * backward)
        layers = 2 * hidden * (others + in_fp8 * ((inputs + 1) * forward + (inputs + gradients + 1) * backward))
        embedding = hidden * (passes.forward + backward)
        head = hidden * passes.forward + wide * backward
    else:
        layers = stage_layers(settings) * 2 * hidden * 2 * (forward + backward)
        embedding = 2 * hidden * passes.forward
        head = 2 * wide * backward
    return layers + (embedding if first else 0.0) + (head if last else 0.0)


def context_bytes(settings: Settings, w: Widths, kind: LayerKind, passes: Passes, layers: int) -> float:
    """Bytes for context parallelism of one microbatch: all other ranks' keys and values, and gradients of them.

    Transformer Engine passes them round the ring once more in the backward pass, beside their gradients; the local
    layers keep them.
    """
    if settings.parallel.cp == 1:
        return 0.0
    others = (settings.parallel.cp - 1) * w.tokens * 2 * w.keys * w.itemsize
    again = 0.0 if settings.model.recompute == "none" else passes.backward
    return layers * others * (passes.forward + again + (2 if kind == "te" else 1) * passes.backward)


def pass_traffic(settings: Settings, kind: LayerKind, *, stage: int, microbatches: int, passes: Passes) -> Traffic:
    """What a rank of one pipeline stage sends while microbatches go through it, updates left out.

    Args:
        settings: settings that fit together.
        kind: which layers.
        stage: pipeline stage, from 0.
        microbatches: on each data-parallel rank; all full.
        passes: of one microbatch.
    """
    parallel, w = settings.parallel, widths(settings)
    first, last = stage == 0, stage == parallel.pp - 1
    tensor = microbatches * tensor_bytes(settings, w, passes, stage)
    between = w.rows * w.hidden * w.itemsize
    # Hidden states go on, gradients go back.
    pipeline = between * ((0 if last else passes.forward) + (0 if first else passes.backward))
    return Traffic(
        tensor=tensor,
        sequence=tensor if parallel.sequence_parallel else 0.0,
        context=microbatches * context_bytes(settings, w, kind, passes, stage_layers(settings)),
        pipeline=microbatches * pipeline,
        data=0.0,
        publish=0.0,
    )


def stage_traffic(
    settings: Settings, kind: LayerKind, *, stage: int, dp: int, microbatches: int, updates: int, passes: Passes,
    published: float = 0.0,
) -> Traffic:  # fmt: skip
    """What a rank of one pipeline stage sends in one step, a scoring pass left out.

    Args:
        settings: settings that fit together.
        kind: which layers.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        microbatches: of one update, on each data-parallel rank; all full.
        updates: optimizer updates of the step.
        passes: of one microbatch.
        published: bytes that a publish to engines sends (`Publishing.sent`).
    """
    # Of tied embeddings both ends sum their gradients (an all-reduce of two).
    tied = [p.numel for p in stage_parameters(settings, stage) if p.tied_across_stages]
    moved = pass_traffic(settings, kind, stage=stage, microbatches=microbatches * updates, passes=passes)
    return dataclasses.replace(
        moved,
        pipeline=moved.pipeline + updates * 4 * sum(tied),
        data=updates * sum(data_bytes(settings, stage, dp)),
        publish=published,
    )


def together(one: Traffic, other: Traffic) -> Traffic:
    """What a rank sends that sends both."""
    return Traffic(**{name: getattr(one, name) + getattr(other, name) for name in Traffic.__slots__})


def busiest(parts: Sequence[Traffic]) -> Traffic:
    """The most that any of these ranks sends, for each purpose."""
    return Traffic(**{name: max(getattr(part, name) for part in parts) for name in Traffic.__slots__})


def data_bytes(settings: Settings, stage: int, dp: int) -> tuple[float, float]:
    """Bytes of gradients and of updated weights that a rank of a stage sends for one update.

    Weights are gathered as they are stored: those in FP8 (`fp8.parameters`) as bytes, after an all-reduce of their
    largest values; each rank transposes its own (Megatron-Core 0.16.1, `_ParamAndGradBucketGroup.start_param_sync`).
    """
    parallel = settings.parallel
    buffers = rank_buffers(settings, stage, dp)
    share = ring(dp * parallel.cp)
    gradients = 4 * sum(buffer.numel for _, buffer in buffers) * share
    if not parallel.distributed_optimizer:
        return 2 * gradients, 0.0
    weights = sum(stored * buffer.numel for stored, buffer in buffers)
    return gradients, (weights + 2 * largest_values_bytes(settings, stage)) * share
