"""A plan: memory of every stage, traffic, and the time of one step, from settings and a device's data sheet.

Time is that of the products at an assumed share of the device's rate, what is computed again and the pipeline's bubble
included, plus traffic at an assumed share of the links' rate where nothing hides it. It is an estimate to compare
layouts with; benchmarks/planner_error.py says how far it is from a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klear.config import Entry, Settings
from megatron_klear.observe.flops import FlopCount, projection_parameters
from megatron_klear.planning.activations import LayerKind, layer_kind
from megatron_klear.planning.devices import DEVICES, Device
from megatron_klear.planning.memory import StageMemory, stage_memory, trainer_state
from megatron_klear.planning.traffic import (
    Passes,
    Traffic,
    busiest,
    data_bytes,
    link_rate,
    stage_traffic,
)
from megatron_klear.planning.workload import SLOTS_USED, SPREAD, Workload, workload

_UPDATE_BYTES = 30
"""Bytes moved per number that a rank updates: gradient read, weight and two moments read and written, copy written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted.

    Attributes:
        efficiency: share of the device's product rate that a rank reaches while it computes.
        link_efficiency: share of the links' and memory's rate that is reached.
        mean_tokens: mean length of a sequence, prompt included; None for a share of the longest.
    """

    efficiency: float = 0.6
    link_efficiency: float = 0.8
    mean_tokens: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what they are spent on; generation of responses is not in it.

    Attributes:
        compute: products of the model, each counted once.
        again: products computed again for the backward pass.
        bubble: stages waiting for one another.
        tensor, context, pipeline, data: traffic that nothing hides.
        optimizer: reading and writing the optimizer's state.
        publish: weights to engines.
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
        microbatches: of one update on each data-parallel rank.
        bubble_share: share of a stage's time that it waits for others.
        flops: of one step of the whole model, nothing counted twice.
        stages: memory by pipeline stage.
        traffic: of one step.
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
    microbatches: int
    bubble_share: float
    flops: FlopCount
    stages: tuple[StageMemory, ...]
    traffic: Traffic
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
    def mfu(self) -> float:
        """Share of the devices' rate that goes into the model, over the time of a step without generation."""
        return self.flops.total / (self.time.total * self.gpus * self.device.flops)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second, over the same time."""
        return self.work.tokens / self.time.total


def make_plan(
    settings: Settings, *, entry: Entry, gpus: int, device_name: str, assumptions: Assumptions | None = None
) -> Plan:
    """Plan a run.

    Args:
        settings: settings that fit together on so many ranks.
        entry: `sft` or `rl`.
        gpus: ranks of the trainer.
        device_name: key of `DEVICES`.
        assumptions: None for the defaults.
    """
    assumed = assumptions or Assumptions()
    parallel, device = settings.parallel, DEVICES[device_name]
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    kind, work = layer_kind(settings, device_name), workload(settings, entry, assumed.mean_tokens)
    microbatches = work.microbatches(settings.packing.token_budget, dp)
    flops = step_flops(settings, work, backward=True)
    if work.scored:
        flops += step_flops(settings, work, backward=False)
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[settings.model.recompute]
    passes = Passes(forward=2.0 if work.scored else 1.0, again=again, backward=1.0)
    stages = tuple(
        stage_memory(
            settings, kind, stage=stage, dp=dp, microbatches=microbatches, entry=entry, room=device.memory_bytes
        )
        for stage in range(parallel.pp)
    )
    traffic = busiest(
        [
            stage_traffic(
                settings, entry, kind, stage=stage, dp=dp, microbatches=microbatches, updates=work.updates,
                passes=passes, machines=-(-gpus // device.per_node),
            )
            for stage in range(parallel.pp)
        ]
    )  # fmt: skip
    bubble = (parallel.pp - 1) / (microbatches + parallel.pp - 1)
    time = _step_time(settings, assumed, device, kind, work, traffic, flops, microbatches, gpus)
    return Plan(
        settings=settings, entry=entry, device_name=device_name, gpus=gpus, dp=dp, kind=kind, assumptions=assumed,
        work=work, microbatches=microbatches, bubble_share=bubble, flops=flops, stages=stages, traffic=traffic,
        time=time,
    )  # fmt: skip


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


def _step_time(
    settings: Settings, assumed: Assumptions, device: Device, kind: LayerKind, work: Workload, traffic: Traffic,
    flops: FlopCount, microbatches: int, gpus: int,
) -> StepTime:  # fmt: skip
    """Seconds of one step.

    Packing spreads tokens evenly over data-parallel ranks, which wait for one another; none has less to do than the
    longest sequence of an update takes.
    """
    parallel = settings.parallel
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    speed = device.flops * assumed.efficiency
    uneven = max(1.0, work.longest * work.updates * dp / work.tokens)
    compute = flops.total * uneven / (gpus * speed)
    layers_only = step_flops(settings, work, backward=False)
    recomputed = {
        "none": 0.0,
        "selective": layers_only.attention,
        "full": layers_only.attention + layers_only.projections,
    }[settings.model.recompute]
    again = recomputed * uneven / (gpus * speed)
    tp_rate, cp_rate, dp_rate, pp_rate = (
        link_rate(device, span) * assumed.link_efficiency
        for span in (parallel.tp, parallel.tp * parallel.cp, parallel.tp * parallel.cp * dp, gpus)
    )
    tensor = traffic.tensor / tp_rate
    context = traffic.context / cp_rate
    if kind == "te":  # its ring works behind the attention of what has arrived
        attention = flops.attention * uneven / (gpus * speed)
        context = max(0.0, context - attention)
    pipeline = traffic.pipeline / pp_rate
    busy = compute + again + tensor + context + pipeline
    per_microbatch = busy / (microbatches * work.updates)
    bubble = (parallel.pp - 1) * per_microbatch * work.updates
    data = work.updates * max(
        _exposed_data(settings, stage, dp, dp_rate, per_microbatch) for stage in range(parallel.pp)
    )
    owned = max(trainer_state(settings, stage=stage, dp=dp).optimizer for stage in range(parallel.pp))
    numbers = owned / (12 if settings.model.dtype == "bfloat16" else 8)
    optimizer = work.updates * numbers * _UPDATE_BYTES / (device.memory_rate * assumed.link_efficiency)
    return StepTime(
        compute=compute, again=again, bubble=bubble, tensor=tensor, context=context, pipeline=pipeline, data=data,
        optimizer=optimizer, publish=traffic.publish / (device.network_rate * assumed.link_efficiency),
    )  # fmt: skip


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


def assumptions_in_words(plan: Plan) -> list[str]:
    """What the figures rest on, a sentence each."""
    assumed, device, work = plan.assumptions, plan.device, plan.work
    kinds = {
        "te": "Transformer Engine's layers (model.layer_spec)",
        "local": "Megatron's local layers with flash-attn",
        "cpu": "Megatron's local layers on a CPU",
    }
    lines = [
        f"{device.title}: {device.flops / 1e12:,.4g} TFLOP/s dense bfloat16 ({device.source})",
        f"links {device.link_rate / 1e9:,.0f} GB/s in a node of {device.per_node}, "
        f"{device.network_rate / 1e9:,.0f} GB/s between nodes, one way; {assumed.link_efficiency:.0%} of that and of "
        f"memory's {device.memory_rate / 1e12:,.2f} TB/s is reached",
        f"products run at {assumed.efficiency:.0%} of the data sheet's rate (--efficiency), which no run has shown yet",
        f"sequences of {work.mean_tokens:,.0f} tokens on average (--mean-tokens), log-normal with a spread of "
        f"{SPREAD:g}, cut off at {work.longest:,}; {SLOTS_USED:.0%} of packed positions used",
        kinds[plan.kind],
        "tensor parallel, pipeline and, unless parallel.overlap_* says otherwise, data parallel traffic is not hidden",
    ]
    if plan.settings.fp8.recipe != "none":
        lines.append("fp8.recipe is left aside: memory and time are those of bfloat16")
    if plan.entry == "rl":
        lines.append("every group of a step is trained on; the time to generate responses is not predicted")
    return lines
