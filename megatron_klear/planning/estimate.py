"""A plan: memory of every stage, traffic, and the time of one step, from settings and a device's data sheet.

Time is that of the products at an assumed share of the device's rate, what is computed again and the pipeline's bubble
included, plus traffic at an assumed share of the links' rate where nothing hides it. It is an estimate to compare
layouts with; benchmarks/planner_error.py says how far it is from a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_klear.config import Entry, Settings
from megatron_klear.observe.flops import FlopCount, projection_parameters
from megatron_klear.planning.activations import LayerKind, layer_kind
from megatron_klear.planning.devices import DEVICES, Device
from megatron_klear.planning.evenness import Evenness, evenness, filled_share, scoring_evenness
from megatron_klear.planning.lengths import StoredLengths, lengths_in_words
from megatron_klear.planning.memory import StageMemory, stage_memory, trainer_state
from megatron_klear.planning.publishing import Publishing, publishing
from megatron_klear.planning.traffic import (
    SCORING,
    Passes,
    Traffic,
    busiest,
    data_bytes,
    link_rate,
    pass_traffic,
    spread_rate,
    stage_traffic,
    together,
)
from megatron_klear.planning.workload import Workload, stored_workload, workload

_UPDATE_BYTES = 30
"""Bytes moved per number that a rank updates: gradient read, weight and two moments read and written, copy written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted.

    Attributes:
        efficiency: share of the device's product rate that a rank reaches while it computes.
        fp8_efficiency: the same for products in FP8, of the rate for them.
        link_efficiency: share of the links' and memory's rate that is reached.
        mean_tokens: mean length of a sequence, prompt included; None for a share of the longest.
        why_assumed: why lengths are not those of the data.
    """

    efficiency: float = 0.6
    fp8_efficiency: float = 0.5
    link_efficiency: float = 0.8
    mean_tokens: float | None = None
    why_assumed: str = "no index was looked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what they are spent on; generation of responses is not in it.

    Attributes:
        compute: products of the model, each counted once.
        again: products computed again for the backward pass.
        bubble: stages waiting for one another.
        tensor, context, pipeline, data: traffic that nothing hides.
        optimizer: reading and writing the optimizer's state.
        publish: weights to engines, and to files meanwhile.
    """

    compute: float
    again: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float
    optimizer: float
    publish: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take.

    Attributes:
        settings, entry, device_name, gpus, dp, kind, assumptions: what was planned.
        work: one step.
        stored: lengths that it was planned with, by the index of `data.sft`; None where they were assumed.
        even: how evenly an update's work lies on data-parallel ranks.
        scoring: how evenly that of the scoring pass lies, which packs all sequences of the step; None without one.
        microbatches: of one update on each data-parallel rank.
        bubble_share: share of a stage's time that it waits for others.
        flops: of one step of the whole model, nothing counted twice.
        stages: memory by pipeline stage.
        traffic: of one step.
        publishing: how weights get to engines after a step; None without servers.
        time: of one step.
    """

    settings: Settings
    entry: Entry
    device_name: str
    gpus: int
    dp: int
    kind: LayerKind
    assumptions: Assumptions
    work: Workload
    stored: StoredLengths | None
    even: Evenness
    scoring: Evenness | None
    microbatches: int
    bubble_share: float
    flops: FlopCount
    stages: tuple[StageMemory, ...]
    traffic: Traffic
    publishing: Publishing | None
    time: StepTime

    @property
    def device(self) -> Device:
        """The device planned for."""
        return DEVICES[self.device_name]

    @property
    def peak(self) -> float:
        """Bytes on the fullest device."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the fullest device holds what it must; true where the device's memory is not judged."""
        return self.device.memory_bytes is None or self.peak <= self.device.memory_bytes

    @property
    def host_at_save_of_a_node(self) -> float:
        """Bytes of host memory that ranks of one node take together while a checkpoint is gathered, on the worst node.

        The first rank of each data-parallel group gathers: the first `tp` ranks of every pipeline stage.
        """
        parallel = self.settings.parallel
        taken: dict[int, float] = {}
        for stage in self.stages:
            for tensor in range(parallel.tp):
                node = (stage.stage * parallel.tp * parallel.cp * self.dp + tensor) // self.device.per_node
                taken[node] = taken.get(node, 0.0) + stage.host_at_save
        return max(taken.values())

    @property
    def mfu(self) -> float:
        """Share of the devices' rate that goes into the model, over the time of a step without generation."""
        return self.flops.total / (self.time.total * self.gpus * self.device.flops)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second, over the same time."""
        return self.work.tokens / self.time.total


def make_plan(
    settings: Settings, *, entry: Entry, gpus: int, device_name: str, assumptions: Assumptions | None = None,
    lengths: StoredLengths | None = None,
) -> Plan:  # fmt: skip
    """Plan a run.

    Args:
        settings: settings that fit together on so many ranks.
        entry: `sft` or `rl`.
        gpus: ranks of the trainer.
        device_name: key of `DEVICES`.
        assumptions: None for the defaults.
        lengths: of `data.sft` by its index, in place of assumed ones.
    """
    assumed = assumptions or Assumptions()
    parallel, device = settings.parallel, DEVICES[device_name]
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    kind = layer_kind(settings, device_name)
    work = _workload(settings, entry, assumed, lengths)
    even = evenness(settings, entry, work, dp, lengths)
    scoring = scoring_evenness(settings, work, dp) if work.scored else None
    microbatches = even.whole_microbatches
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[settings.model.recompute]
    passes = Passes(forward=1.0, again=again, backward=1.0)
    pipeline_stages = range(parallel.pp)
    stages = tuple(
        stage_memory(settings, kind, stage=stage, dp=dp, microbatches=microbatches, entry=entry, device=device)
        for stage in pipeline_stages
    )
    published = publishing(settings, entry, machines=-(-gpus // device.per_node))
    sent = [
        stage_traffic(
            settings, kind, stage=stage, dp=dp, microbatches=microbatches, updates=work.updates, passes=passes,
            published=0.0 if published is None else published.sent,
        )
        for stage in pipeline_stages
    ]  # fmt: skip
    phases = [
        _Phase(
            flops=step_flops(settings, work, backward=True),
            recomputed=settings.model.recompute,
            even=even,
            pipelines=work.updates,
            traffic=busiest(sent),
        )
    ]
    if scoring is not None:
        scored = [
            pass_traffic(settings, kind, stage=stage, microbatches=scoring.whole_microbatches, passes=SCORING)
            for stage in pipeline_stages
        ]
        phases.append(
            _Phase(
                flops=step_flops(settings, work, backward=False),
                recomputed="none",
                even=scoring,
                pipelines=1,
                traffic=busiest(scored),
            )
        )
        sent = [together(one, other) for one, other in zip(sent, scored, strict=True)]
    flops = sum((phase.flops for phase in phases), FlopCount())
    return Plan(
        settings=settings, entry=entry, device_name=device_name, gpus=gpus, dp=dp, kind=kind, assumptions=assumed,
        work=work, stored=lengths, even=even, scoring=scoring, microbatches=microbatches,
        bubble_share=(parallel.pp - 1) / (microbatches + parallel.pp - 1), flops=flops, stages=stages,
        traffic=busiest(sent), publishing=published,
        time=_step_time(settings, assumed, device, kind, work, phases, gpus, published),
    )  # fmt: skip


def _workload(settings: Settings, entry: Entry, assumed: Assumptions, lengths: StoredLengths | None) -> Workload:
    if lengths is None:
        slots_used = filled_share(settings, workload(settings, entry, assumed.mean_tokens)) if entry == "sft" else 1.0
        return workload(settings, entry, assumed.mean_tokens, slots_used=slots_used)
    return stored_workload(lengths.lengths, [update for update, _ in lengths.updates.steps])


def expected_evenness(
    settings: Settings, dp: int, lengths: StoredLengths | None, why_assumed: str
) -> tuple[Evenness, float, str]:
    """How evenly the updates of fine-tuning would lie on data-parallel ranks.

    Args:
        settings: settings that fit together.
        dp: data-parallel ranks.
        lengths: of `data.sft` by its index; None to assume some.
        why_assumed: in that case, the reason.

    Returns:
        How evenly, tokens of a sequence on average, and which lengths that is of, in words.
    """
    work = _workload(settings, "sft", Assumptions(), lengths)
    even = evenness(settings, "sft", work, dp, lengths)
    return even, work.mean_tokens, lengths_in_words(work, lengths, why_assumed)


def step_flops(settings: Settings, work: Workload, *, backward: bool) -> FlopCount:
    """Operations of a step's sequences by their mean length and mean squared length, as `observe/flops.py` counts."""
    arch, count = settings.architecture, work.sequences
    pairs = count * (work.mean_square + work.mean_tokens) / 2
    passes = 3.0 if backward else 1.0
    return FlopCount(
        projections=passes * 2.0 * work.tokens * projection_parameters(arch) * arch.num_layers,
        attention=passes * 4.0 * arch.num_attention_heads * arch.head_dim * pairs * arch.num_layers,
        head=passes * 2.0 * (work.tokens - count) * arch.hidden_size * arch.vocab_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """A part of a step in which microbatches go through the pipeline: all updates, or the scoring pass.

    Attributes:
        flops: of the whole model, nothing counted twice.
        recomputed: the recompute policy, `none` where nothing is kept.
        even: how its work lies on data-parallel ranks.
        pipelines: how often the pipeline is filled and emptied.
        traffic: of the busiest rank.
    """

    flops: FlopCount
    recomputed: str
    even: Evenness
    pipelines: int
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class _PhaseTime:
    """Seconds of a phase, by what they are spent on, as in `StepTime`; `per_microbatch` is their sum for one."""

    compute: float
    again: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    per_microbatch: float


def _phase_time(
    settings: Settings, assumed: Assumptions, device: Device, kind: LayerKind, phase: _Phase, gpus: int
) -> _PhaseTime:
    """Seconds of a phase on the rank that has the most to do, for which the others wait.

    That is one whose sequences cost most, and of the last pipeline stage: all have equally many layers, and it has the
    head besides.
    """
    parallel, flops = settings.parallel, phase.flops
    seconds_per_flop = phase.even.slowest / (gpus * device.flops * assumed.efficiency)
    quicker = _projections_speedup(settings, assumed, device)
    compute = (flops.projections / quicker + flops.attention + flops.head * parallel.pp) * seconds_per_flop
    forward = 1 / 3  # of a phase with a backward pass
    recomputed = {
        "none": 0.0,
        "selective": forward * flops.attention,
        "full": forward * (flops.attention + flops.projections / quicker),
    }[phase.recomputed]
    again = recomputed * seconds_per_flop
    tp_rate, cp_rate, pp_rate = (
        link_rate(device, span) * assumed.link_efficiency for span in (parallel.tp, parallel.tp * parallel.cp, gpus)
    )
    tensor = phase.traffic.tensor / tp_rate
    context = phase.traffic.context / cp_rate
    if kind == "te":  # its ring works behind the attention of what has arrived
        context = max(0.0, context - flops.attention * seconds_per_flop)
    pipeline = phase.traffic.pipeline / pp_rate
    busy = compute + again + tensor + context + pipeline
    per_microbatch = busy / (phase.even.whole_microbatches * phase.pipelines)
    bubble = (parallel.pp - 1) * per_microbatch * phase.pipelines
    return _PhaseTime(
        compute=compute, again=again, bubble=bubble, tensor=tensor, context=context, pipeline=pipeline,
        per_microbatch=per_microbatch,
    )  # fmt: skip


def _step_time(
    settings: Settings, assumed: Assumptions, device: Device, kind: LayerKind, work: Workload,
    phases: Sequence[_Phase], gpus: int, published: Publishing | None,
) -> StepTime:  # fmt: skip
    """Seconds of one step; its updates are the first of its phases."""
    parallel = settings.parallel
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    times = [_phase_time(settings, assumed, device, kind, phase, gpus) for phase in phases]
    summed = {
        name: sum(getattr(time, name) for time in times)
        for name in ("compute", "again", "bubble", "tensor", "context", "pipeline")
    }
    dp_rate = spread_rate(device, parallel.tp * parallel.cp * dp, parallel.tp) * assumed.link_efficiency
    data = work.updates * max(
        _exposed_data(settings, stage, dp, dp_rate, times[0].per_microbatch) for stage in range(parallel.pp)
    )
    owned = max(trainer_state(settings, stage=stage, dp=dp).optimizer for stage in range(parallel.pp))
    numbers = owned / (12 if settings.model.dtype == "bfloat16" else 8)
    optimizer = work.updates * numbers * _UPDATE_BYTES / (device.memory_rate * assumed.link_efficiency)
    publish = 0.0 if published is None else published.seconds(device, assumed.link_efficiency)
    return StepTime(**summed, data=data, optimizer=optimizer, publish=publish)


def _projections_speedup(settings: Settings, assumed: Assumptions, device: Device) -> float:
    """How much sooner the layers' products are done than in bfloat16; attention and the head stay in it."""
    fp8 = settings.fp8
    if not fp8.on or device.fp8_flops is None:
        return 1.0
    layers = settings.architecture.num_layers
    share = max(0, layers - fp8.first_layers_bf16 - fp8.last_layers_bf16) / layers
    ratio = device.flops * assumed.efficiency / (device.fp8_flops * assumed.fp8_efficiency)
    return 1 / (1 - share * (1 - ratio))


def _exposed_data(settings: Settings, stage: int, dp: int, rate: float, microbatch_seconds: float) -> float:
    """Seconds of one update that gradients and weights keep a rank waiting.

    An overlapped reduction hides behind the last microbatch's backward pass (two thirds of its time), an overlapped
    gathering behind the next forward pass (one third).
    """
    gradients, weights = (sent / rate for sent in data_bytes(settings, stage, dp))
    if settings.parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - 2 / 3 * microbatch_seconds)
    if settings.parallel.overlap_param_gather:
        weights = max(0.0, weights - 1 / 3 * microbatch_seconds)
    return gradients + weights
