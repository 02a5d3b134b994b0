"""Bytes that a rank sends in one step, by what they are for, and over which links.

Collectives are counted as rings send them: an all-gather or reduce-scatter of n bytes over p ranks sends
(p - 1) / p * n from each, an all-reduce twice that. Ranks are placed as Megatron does, tensor parallel neighbours
first, then context, data and pipeline parallel; a group that fits into a node talks inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klear.config import Entry, Settings
from megatron_klear.planning.activations import LayerKind, Widths, widths
from megatron_klear.planning.devices import Device
from megatron_klear.planning.memory import rank_buffer, whole_model_bytes
from megatron_klear.planning.parameters import stage_layers, stage_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How often one microbatch goes through a stage in a step, on average over both kinds of passes.

    Attributes:
        forward: forward passes of one step, those of scoring included.
        again: forward passes of layers that are computed again in the backward pass.
        backward: backward passes.
    """

    forward: float
    again: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that the busiest rank sends in one step.

    Attributes:
        tensor: hidden states over tensor parallel ranks, sequence parallel's included; `sequence` tells its part.
        sequence: the part of `tensor` that gathers and scatters tokens.
        context: keys, values and their gradients.
        pipeline: hidden states and their gradients between stages.
        data: gradients and updated weights.
        publish: weights to rollout engines, from the ranks that send them.
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


def tensor_bytes(settings: Settings, w: Widths, passes: Passes, *, first: bool, last: bool) -> float:
    """Bytes for tensor parallelism of one microbatch: two pairs of products per layer, and the vocabulary's ends.

    Without sequence parallelism each pair ends in an all-reduce of the hidden states, forward and backward. With it the
    all-reduce is split in two, and the backward pass gathers the input of the first product once more. Embeddings are
    summed over shards of the vocabulary; the head sums the gradient of its input in float32.
    """
    parallel = settings.parallel
    if parallel.tp == 1:
        return 0.0
    hidden = w.tokens * w.hidden * w.itemsize * ring(parallel.tp)
    wide = hidden * 4 / w.itemsize
    forward, backward = passes.forward + passes.again, passes.backward
    if parallel.sequence_parallel:
        layers = stage_layers(settings) * 2 * hidden * (2 * forward + 3 * backward)
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


def stage_traffic(
    settings: Settings, entry: Entry, kind: LayerKind, *, stage: int, dp: int, microbatches: int, updates: int,
    passes: Passes, machines: int = 1,
) -> Traffic:  # fmt: skip
    """What a rank of one pipeline stage sends in one step.

    Args:
        settings: settings that fit together.
        entry: `sft` or `rl`.
        kind: which layers.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        microbatches: of one update, on each data-parallel rank; all full.
        updates: optimizer updates of the step.
        passes: of one microbatch.
        machines: on each of which `sglang.servers` are started.
    """
    parallel, w = settings.parallel, widths(settings)
    first, last = stage == 0, stage == parallel.pp - 1
    many = microbatches * updates
    tensor = many * tensor_bytes(settings, w, passes, first=first, last=last)
    between = w.rows * w.hidden * w.itemsize
    # Hidden states go on, gradients go back; of tied embeddings both ends sum their gradients (an all-reduce of two).
    pipeline = many * between * ((0 if last else passes.forward) + (0 if first else passes.backward))
    tied = [p.numel for p in stage_parameters(settings, stage) if p.tied_across_stages]
    served = entry == "rl" and settings.rollout.engine == "sglang"
    engines = len(settings.sglang.urls) or settings.sglang.servers * machines
    if settings.sglang.placement == "colocated":
        engines = 0  # handles of memory on the same GPU
    return Traffic(
        tensor=tensor,
        sequence=tensor if parallel.sequence_parallel else 0.0,
        context=many * context_bytes(settings, w, kind, passes, stage_layers(settings)),
        pipeline=pipeline + updates * 4 * sum(tied),
        data=updates * sum(data_bytes(settings, stage, dp)),
        publish=float(whole_model_bytes(settings)) * engines if served else 0.0,
    )


def busiest(parts: Sequence[Traffic]) -> Traffic:
    """The most that any of these ranks sends, for each purpose."""
    return Traffic(**{name: max(getattr(part, name) for part in parts) for name in Traffic.__slots__})


def data_bytes(settings: Settings, stage: int, dp: int) -> tuple[float, float]:
    """Bytes of gradients and of updated weights that a rank of a stage sends for one update."""
    parallel = settings.parallel
    numel = rank_buffer(settings, stage, dp).numel
    share = ring(dp * parallel.cp)
    item = 2 if settings.model.dtype == "bfloat16" else 4
    if parallel.distributed_optimizer:
        return 4 * numel * share, item * numel * share
    return 2 * 4 * numel * share, 0.0
