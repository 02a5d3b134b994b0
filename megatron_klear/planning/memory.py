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
from megatron_klear.planning.devices import Device
from megatron_klear.planning.fp8 import weight_copies
from megatron_klear.planning.parameters import Parameter, fp8_layers, stage_parameters

RESERVED_BYTES = 3e9
"""CUDA context, NCCL's buffers, workspaces of cuBLAS and cuDNN: an allowance, not a measurement."""

ENGINE_RESERVED_BYTES = 3e9
"""The same for the process of an SGLang server on a trainer's GPU, its graphs and activations included."""

ENGINE_ASLEEP_BYTES = 1e9
"""Of that, what stays while the trainer trains: the process's CUDA context and libraries; an allowance, too."""

ENGINE_LEFT_BYTES = 14e9
"""What SGLang leaves of a whole GPU beside weights and KV cache where `sglang.memory_fraction` is not set: 512 MiB, 1.5
MiB for each of 8,192 tokens of a prefill, and something for graphs (0.5.23, `arg_groups/memory_hook.py`)."""

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
        fp8_copies: weights in FP8 beside the parameters (`fp8.weight_copies`).
        activations: kept for the backward pass, of all microbatches in flight.
        in_flight: microbatches in flight.
        workspace: a layer's backward pass, and with full recomputation the layer computed again.
        head_chunk: while the fused head runs.
        publish: buckets of a publish to engines.
        engine_weights: a rollout engine's copy of the model, if it is on this device.
        kv_cache: keys and values of responses being generated, if they are on this device.
        kv_tokens: tokens of which the cache holds keys and values.
        engine_reserved: allowance for the process of an engine on this device.
        reserved: allowance for libraries and lost between blocks.
        while_training, while_generating: bytes taken in each phase; engines that take turns count in the second, and
            in the first their process alone.
        host_at_save: host memory that saving a checkpoint takes for this rank, if it is the one that gathers.
        host_while_generating: host memory for what makes room for an engine.
    """

    stage: int
    state: TrainerState
    fp8_copies: float
    activations: float
    in_flight: int
    workspace: float
    head_chunk: float
    publish: float
    engine_weights: float
    kv_cache: float
    kv_tokens: int
    engine_reserved: float
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
def rank_buffers(settings: Settings, stage: int, dp: int) -> tuple[tuple[int, GradientBuffer], ...]:
    """Buffers of a rank of a pipeline stage: bytes of each of a buffer's weights, and the layout of their gradients.

    Megatron has one buffer for each type of weights (`DistributedDataParallel`), so that with `fp8.parameters` there
    are two: weights in FP8 are bytes, all others bfloat16. Gradients are float32 in both.
    """
    parallel = settings.parallel
    item = 2 if settings.model.dtype == "bfloat16" else 4
    groups: dict[int, list[Parameter]] = {}
    for parameter in stage_parameters(settings, stage):
        stored = 1 if settings.fp8.parameters and parameter.fp8_shape is not None else item
        groups.setdefault(stored, []).append(parameter)
    return tuple(
        (
            stored,
            gradient_buffer(
                parameters,
                shards=dp * parallel.cp,
                distributed=parallel.distributed_optimizer,
                bucket_size=bucket_size_of(overlap_grad_reduce=parallel.overlap_grad_reduce, dp=dp, stage=stage),
            ),
        )
        for stored, parameters in groups.items()
    )


@lru_cache(maxsize=4096)
def _shares(settings: Settings, stage: int, dp: int) -> list[int]:
    owned = [buffer.owned() for _, buffer in rank_buffers(settings, stage, dp)]
    return [sum(parts) for parts in zip(*owned, strict=True)]


def trainer_state(settings: Settings, *, stage: int, dp: int, shard: int | None = None) -> TrainerState:
    """Bytes that stay.

    Args:
        settings: settings that fit together.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        shard: place among the data and context parallel ranks, tensor parallel ones left out; None for the worst.
    """
    buffers = rank_buffers(settings, stage, dp)
    owned = sum(parameter.numel for parameter in stage_parameters(settings, stage))
    if settings.parallel.distributed_optimizer:
        shares = _shares(settings, stage, dp)
        owned = max(shares) if shard is None else shares[shard]
    copies = 3 if settings.model.dtype == "bfloat16" else 2  # of float32 weights no second copy is kept
    return TrainerState(
        # Without the distributed optimizer buffers have no padding, and weights are not in them.
        weights=sum(stored * buffer.numel for stored, buffer in buffers),
        gradients=_STATE_BYTES * sum(buffer.numel for _, buffer in buffers),
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


def engine_model_bytes(settings: Settings) -> int:
    """A rollout engine's copy of the model, on all of its GPUs together.

    With `sglang.quantization` fp8 the four matrices of each layer are bytes, embedding, head and norms as they were;
    scales are left out.
    """
    arch, sglang = settings.architecture, settings.sglang
    if settings.rollout.engine != "sglang":
        return whole_model_bytes(settings)
    item, own = _engine_itemsize(settings), 2 if settings.model.dtype == "bfloat16" else 4
    numbers = whole_model_bytes(settings) // own
    if sglang.quantization == "none":
        return item * numbers
    heads = 2 * arch.num_attention_heads + 2 * arch.num_query_groups
    matrices = arch.num_layers * arch.hidden_size * (arch.head_dim * heads + 3 * arch.ffn_hidden_size)
    return item * (numbers - matrices) + matrices


def _engine_itemsize(settings: Settings) -> int:
    """Bytes of an engine's number, of weights and of keys and values."""
    served = settings.rollout.engine == "sglang" and settings.sglang.dtype != "auto"
    return 4 if (settings.sglang.dtype if served else settings.model.dtype) == "float32" else 2


def is_colocated(settings: Settings) -> bool:
    """Whether SGLang's servers take turns with the trainer on its GPUs."""
    return settings.rollout.engine == "sglang" and settings.sglang.placement == "colocated"


def kept_activations(
    settings: Settings, kind: LayerKind, *, stage: int, microbatches: int, recompute: str | None = None
) -> float:
    """Bytes of activations that a rank of a stage keeps for the backward passes of all its microbatches in flight.

    Args:
        settings: settings that fit together.
        kind: which layers the model is built of.
        stage: pipeline stage, from 0.
        microbatches: of one optimizer update.
        recompute: a policy other than that of the settings.
    """
    recompute, parallel = recompute or settings.model.recompute, settings.parallel
    w, recipe = widths(settings), settings.fp8.recipe
    layers = {name: layer_bytes(w, kind, name) for name in {"none", recipe}}
    per_microbatch = sum(layers[recipe if in_fp8 else "none"].kept(recompute) for in_fp8 in fp8_layers(settings, stage))
    per_microbatch += index_bytes(w, kind, recompute, first_stage=stage == 0)
    per_microbatch += head_bytes(w, kind) if stage == parallel.pp - 1 else 0.0
    return in_flight(settings, stage, microbatches) * per_microbatch


def in_flight(settings: Settings, stage: int, microbatches: int) -> int:
    """Microbatches of which a stage keeps activations at the same time."""
    return min(microbatches, settings.parallel.pp - stage)


def stage_memory(
    settings: Settings, kind: LayerKind, *, stage: int, dp: int, microbatches: int, entry: str, device: Device
) -> StageMemory:
    """Memory of the worst rank of a stage, with microbatches that fill the token budget.

    Args:
        settings: settings that fit together.
        kind: which layers the model is built of.
        stage: pipeline stage, from 0.
        dp: data parallel size.
        microbatches: of one optimizer update.
        entry: `sft` or `rl`.
        device: whose memory bounds an engine's cache, and whose products in FP8 may need transposed copies.
    """
    parallel, recompute = settings.parallel, settings.model.recompute
    state, w = trainer_state(settings, stage=stage, dp=dp), widths(settings)
    recipe, transposes = settings.fp8.recipe, device.fp8_transposes
    kinds = [recipe if in_fp8 else "none" for in_fp8 in fp8_layers(settings, stage)]
    layers = {name: layer_bytes(w, kind, name) for name in set(kinds)}
    activations = kept_activations(settings, kind, stage=stage, microbatches=microbatches)
    workspace = max(
        backward_workspace(w, name, transposes=transposes) + (layer.kept("none") if recompute == "full" else 0.0)
        for name, layer in layers.items()
    )
    chunk = head_chunk_bytes(settings, w, kind) if stage == parallel.pp - 1 else 0.0
    served = entry == "rl" and settings.needs_engine(entry) and settings.rollout.engine == "sglang"
    publish = 2.0 * settings.weight_sync.bucket_bytes if served else 0.0
    passing = activations + max(workspace, chunk)
    libraries = RESERVED_BYTES if kind != "cpu" else 0.0
    reserved = libraries + FRAGMENTED_SHARE * passing
    copies = weight_copies(settings, stage, transposes=transposes)
    room = device.memory_bytes
    left = None if room is None else room - publish - libraries - copies
    engine = _engine(settings, entry, state, left, room)
    return StageMemory(
        stage=stage,
        state=state,
        fp8_copies=copies,
        activations=activations,
        in_flight=in_flight(settings, stage, microbatches),
        workspace=workspace,
        head_chunk=chunk,
        publish=publish,
        engine_weights=engine.weights,
        kv_cache=engine.cache,
        kv_tokens=engine.tokens,
        engine_reserved=engine.reserved,
        reserved=reserved,
        while_training=state.total
        + copies
        + passing
        + reserved
        + engine.asleep
        + (engine.weights if engine.stays else 0.0),
        while_generating=copies
        + (
            engine.trainer + publish + engine.weights + engine.cache + engine.reserved + libraries
            if engine.weights
            else state.total + publish + reserved
        ),
        host_at_save=_host_at_save(settings, stage, dp),
        host_while_generating=engine.host,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """What a rollout engine on the trainer's devices takes, and what of the trainer's state stays beside it."""

    weights: float = 0.0
    cache: float = 0.0
    tokens: int = 0
    reserved: float = 0.0
    trainer: float = 0.0
    host: float = 0.0
    asleep: float = 0.0
    stays: bool = False


def _engine(settings: Settings, entry: str, state: TrainerState, room: float | None, device: float | None) -> _Engine:
    """What an engine takes where trainer and engine have `room` of a device's bytes together; None for no bound."""
    if entry != "rl" or not settings.needs_engine(entry):
        return _Engine()
    local, colocated = settings.rollout.engine == "local", is_colocated(settings)
    if not local and not colocated:
        return _Engine()
    sglang, arch = settings.sglang, settings.architecture
    tp = 1 if local else sglang.server_tp
    longest = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens
    # Ranks beyond the number of key heads hold copies of them.
    per_token = kv_bytes_per_token(arch, _engine_itemsize(settings)) / min(tp, arch.num_query_groups)
    wanted = settings.rollout.batch_responses * longest
    weights = engine_model_bytes(settings) / tp
    if local:  # in the training process, beside everything else
        cache, trainer = wanted * per_token, float(state.total)
        return _Engine(weights=weights, cache=cache, tokens=wanted, trainer=trainer, stays=True)
    away = state.gradients + state.optimizer
    host = float(state.optimizer)
    if sglang.offload_weights:
        away, host = state.total, host + state.weights
    trainer = float(state.total - away)
    tokens = wanted
    if room is not None and device is not None:
        # Of what SGLang finds free when it starts, a share is for weights and cache.
        free = room - trainer - ENGINE_RESERVED_BYTES
        share = 1 - ENGINE_LEFT_BYTES / device if sglang.memory_fraction is None else sglang.memory_fraction
        tokens = min(wanted, int((share * free - weights) // per_token))
    tokens = max(longest, tokens)  # less than one longest response would not do
    if sglang.max_total_tokens is not None:
        tokens = min(tokens, sglang.max_total_tokens)
    return _Engine(
        weights=weights, cache=tokens * per_token, tokens=tokens, reserved=ENGINE_RESERVED_BYTES, trainer=trainer,
        host=host, asleep=ENGINE_ASLEEP_BYTES,
    )  # fmt: skip


def _host_at_save(settings: Settings, stage: int, dp: int) -> float:
    """Host memory for a checkpoint on the rank that gathers the optimizer's state of its data-parallel group.

    Megatron gathers three float32 buffers, one after the other and bucket by bucket: beside them are the ranks' parts
    of one bucket, their concatenation, and this rank's own part of all three. Without the distributed optimizer tensors
    pass one by one.
    """
    buffers = [buffer for _, buffer in rank_buffers(settings, stage, dp)]
    sizes = [end - start for buffer in buffers for start, end in buffer.ranges]
    if not settings.parallel.distributed_optimizer:
        return float(_STATE_BYTES * max(sizes))
    bucket, shards = max(buffer.largest_bucket for buffer in buffers), buffers[0].shards
    return float(_STATE_BYTES * (3 * sum(sizes) + 2 * bucket + 3 * bucket // shards))
