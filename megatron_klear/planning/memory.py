"""Device and host memory of a rank, part by part, of the worst rank of every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_klear.config import Architecture, Settings
from megatron_klear.planning.activations import (
    LayerKind,
    backward_workspace,
    head_bytes,
    head_chunk_bytes,
    index_bytes,
    layer_bytes,
    widths,
)
from megatron_klear.planning.buffers import GradientBuffer, bucket_size_of, gradient_buffer
from megatron_klear.planning.parameters import stage_layers, stage_parameters

RESERVED_BYTES = 3e9
"""CUDA context, NCCL's buffers, workspaces of cuBLAS and cuDNN: an allowance, not a measurement."""

FRAGMENTED_SHARE = 0.05
"""Of what comes and goes (activations and workspaces), so much again is lost between blocks of torch's allocator."""

_STATE_BYTES = 4
"""Float32: gradients, weights of the optimizer and each of its two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Bytes of a rank that stay through a run; counted exactly, padding included.

    Attributes:
        weights: as the forward pass reads them.
        gradients: Megatron's float32 buffer.
        optimizer: float32 weights where the model's are not, and two moments.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on the worst rank of a pipeline stage.

    Attributes:
        stage: from 0.
        state: weights, gradients, optimizer.
        activations: kept for the backward pass, of all microbatches in flight.
        in_flight: microbatches in flight.
        workspace: a layer's backward pass, and with full recomputation the layer computed again.
        head_chunk: while the fused head runs.
        publish: buckets of a publish to engines.
        engine_weights: a rollout engine's copy of the model, if it is on this device.
        kv_cache: keys and values of responses being generated, if they are on this device.
        reserved: allowance for libraries and lost between blocks.
        while_training, while_generating: bytes taken in each phase; engines that take turns count in the second only.
        host_at_save: host memory that saving a checkpoint takes for this rank, if it is the one that gathers.
        host_while_generating: host memory for what makes room for an engine.
    """

    stage: int
    state: TrainerState
    activations: float
    in_flight: int
    workspace: float
    head_chunk: float
    publish: float
    engine_weights: float
    kv_cache: float
    reserved: float
    while_training: float
    while_generating: float
    host_at_save: float
    host_while_generating: float

    @property
    def peak(self) -> float:
        """The larger of both phases."""
        return max(self.while_training, self.while_generating)


@lru_cache(maxsize=4096)
def rank_buffer(settings: Settings, stage: int, dp: int) -> GradientBuffer:
    """Layout of the gradients of a rank of a pipeline stage."""
    parallel = settings.parallel
    return gradient_buffer(
        stage_parameters(settings, stage),
        shards=dp * parallel.cp,
        distributed=parallel.distributed_optimizer,
        bucket_size=bucket_size_of(overlap_grad_reduce=parallel.overlap_grad_reduce, dp=dp, stage=stage),
    )


@lru_cache(maxsize=4096)
def _shares(settings: Settings, stage: int, dp: int) -> list[int]:
    return rank_buffer(settings, stage, dp).owned()


def trainer_state(settings: Settings, *, stage: int, dp: int, shard: int | None = None) -> TrainerState:
    """Bytes that stay.

    Args:
        settings: settings that fit together.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        shard: place among the data and context parallel ranks, tensor parallel ones left out; None for the worst.
    """
    item = 2 if settings.model.dtype == "bfloat16" else 4
    distributed = settings.parallel.distributed_optimizer
    buffer = rank_buffer(settings, stage, dp)
    numel = sum(parameter.numel for parameter in stage_parameters(settings, stage))
    owned = numel
    if distributed:
        shares = _shares(settings, stage, dp)
        owned = max(shares) if shard is None else shares[shard]
    copies = 3 if item == 2 else 2  # of float32 weights no second copy is kept
    return TrainerState(
        weights=item * (buffer.numel if distributed else numel),
        gradients=_STATE_BYTES * buffer.numel,
        optimizer=_STATE_BYTES * copies * owned,
    )


def kv_bytes_per_token(arch: Architecture, itemsize: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return 2 * arch.num_layers * arch.num_query_groups * arch.head_dim * itemsize


def whole_model_bytes(settings: Settings) -> int:
    """A copy of the model in its data type, padding of the vocabulary left out."""
    arch = settings.architecture
    layer = arch.hidden_size * arch.head_dim * (arch.num_attention_heads + 2 * arch.num_query_groups)
    layer += arch.num_attention_heads * arch.head_dim * arch.hidden_size + 3 * arch.hidden_size * arch.ffn_hidden_size
    layer += 2 * arch.hidden_size + 2 * arch.head_dim
    words = arch.vocab_size * arch.hidden_size * (1 if arch.tie_embeddings else 2)
    item = 2 if settings.model.dtype == "bfloat16" else 4
    return item * (layer * arch.num_layers + arch.hidden_size + words)


def is_colocated(settings: Settings) -> bool:
    """Whether SGLang's servers take turns with the trainer on its GPUs."""
    return settings.rollout.engine == "sglang" and settings.sglang.placement == "colocated"


def stage_memory(
    settings: Settings, kind: LayerKind, *, stage: int, dp: int, microbatches: int, entry: str, room: float | None
) -> StageMemory:
    """Memory of the worst rank of a stage, with microbatches that fill the token budget.

    Args:
        settings: settings that fit together.
        kind: which layers the model is built of.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        microbatches: of one optimizer update.
        entry: `sft` or `rl`.
        room: bytes of the device, which bound an engine's cache; None for no bound.
    """
    parallel, recompute = settings.parallel, settings.model.recompute
    state, w = trainer_state(settings, stage=stage, dp=dp), widths(settings)
    layer = layer_bytes(w, kind)
    first, last = stage == 0, stage == parallel.pp - 1
    in_flight = min(microbatches, parallel.pp - stage)
    per_microbatch = stage_layers(settings) * layer.kept(recompute)
    per_microbatch += index_bytes(w, kind, recompute, first_stage=first)
    per_microbatch += head_bytes(w, kind) if last else 0.0
    activations = in_flight * per_microbatch
    workspace = backward_workspace(w) + (layer.kept("none") if recompute == "full" else 0.0)
    chunk = head_chunk_bytes(settings, w, kind) if last else 0.0
    served = entry == "rl" and settings.rollout.engine == "sglang"
    publish = 2.0 * settings.weight_sync.bucket_bytes if served else 0.0
    passing = activations + max(workspace, chunk)
    libraries = RESERVED_BYTES if kind != "cpu" else 0.0
    reserved = libraries + FRAGMENTED_SHARE * passing
    engine = _engine(settings, entry, state, None if room is None else room - publish - libraries)
    return StageMemory(
        stage=stage,
        state=state,
        activations=activations,
        in_flight=in_flight,
        workspace=workspace,
        head_chunk=chunk,
        publish=publish,
        engine_weights=engine.weights,
        kv_cache=engine.cache,
        reserved=reserved,
        while_training=state.total + passing + reserved + (engine.weights if engine.stays else 0.0),
        while_generating=engine.trainer + publish + engine.weights + engine.cache + libraries
        if engine.weights
        else state.total + publish + reserved,
        host_at_save=_host_at_save(settings, stage, dp),
        host_while_generating=engine.host,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """What a rollout engine on the trainer's devices takes, and what of the trainer's state stays beside it."""

    weights: float = 0.0
    cache: float = 0.0
    trainer: float = 0.0
    host: float = 0.0
    stays: bool = False


def _engine(settings: Settings, entry: str, state: TrainerState, room: float | None) -> _Engine:
    """What an engine takes where trainer and engine have `room` bytes together; None for no bound."""
    if entry != "rl":
        return _Engine()
    local, colocated = settings.rollout.engine == "local", is_colocated(settings)
    if not local and not colocated:
        return _Engine()
    tp = 1 if local else settings.sglang.server_tp
    item = 2 if settings.model.dtype == "bfloat16" else 4
    longest = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens
    per_token = kv_bytes_per_token(settings.architecture, item) / tp
    wanted = settings.rollout.batch_responses * longest * per_token
    weights = whole_model_bytes(settings) / tp
    if local:  # in the training process, beside everything else
        return _Engine(weights=weights, cache=wanted, trainer=float(state.total), stays=True)
    away = state.gradients + state.optimizer
    host = float(state.optimizer)
    if settings.sglang.offload_weights:
        away, host = state.total, host + state.weights
    trainer = float(state.total - away)
    # SGLang's cache takes what is left; less than one longest response would not do.
    left = wanted if room is None else float(int(room - trainer - weights))
    cache = max(longest * per_token, min(wanted, left))
    return _Engine(weights=weights, cache=cache, trainer=trainer, host=host)


def _host_at_save(settings: Settings, stage: int, dp: int) -> float:
    """Host memory for a checkpoint on the rank that gathers the optimizer's state of its data-parallel group.

    Megatron gathers three float32 buffers, one after the other and bucket by bucket: beside them are the ranks' parts
    of one bucket, their concatenation, and this rank's own part of all three. Without the distributed optimizer tensors
    pass one by one.
    """
    buffer = rank_buffer(settings, stage, dp)
    if not settings.parallel.distributed_optimizer:
        return float(_STATE_BYTES * max(end - start for start, end in buffer.ranges))
    numel = sum(end - start for start, end in buffer.ranges)
    return float(_STATE_BYTES * (3 * numel + 2 * buffer.largest_bucket + 3 * buffer.largest_bucket // buffer.shards))
