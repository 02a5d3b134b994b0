"""What a plan's figures rest on, in words."""

from __future__ import annotations

from megatron_klear.config import Settings
from megatron_klear.planning.estimate import Plan
from megatron_klear.planning.fp8 import copies
from megatron_klear.planning.lengths import lengths_in_words


def assumptions_in_words(plan: Plan) -> list[str]:
    """What the figures rest on, a sentence each."""
    assumed, device = plan.assumptions, plan.device
    option = " (--mean-tokens)" if plan.stored is None else ""
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
        *([_memory_in_words(device.memory_bytes)] if device.memory_bytes is not None else []),
        f"products run at {assumed.efficiency:.0%} of the data sheet's rate (--efficiency), which no run has shown yet",
        f"{lengths_in_words(plan.work, plan.stored, assumed.why_assumed)}{option}, packed as the run packs them: "
        f"{plan.even.microbatches:.3g} microbatches an update, {plan.even.slots_used:.1%} full, the slowest "
        f"data-parallel rank has {plan.even.slowest - 1:.1%} more to do than the mean",
        kinds[plan.kind],
        *([_adapters_in_words(plan)] if plan.gpus > device.per_node else []),
        "tensor parallel, pipeline and, unless parallel.overlap_* says otherwise, data parallel traffic is not hidden",
    ]
    if plan.settings.fp8.on and device.fp8_flops is not None:
        lines.append(
            f"products of the layers in FP8 run at {assumed.fp8_efficiency:.0%} of {device.fp8_flops / 1e12:,.4g} "
            f"TFLOP/s, scaling included; attention, head{_bf16_layers(plan.settings)} in bfloat16"
        )
        lines.append(_fp8_in_words(plan))
        lines.append("MFU is a share of the bfloat16 rate, of products in FP8 too, whose own rate is twice that")
    if plan.scoring is not None:
        lines.append(
            f"old logprobs are computed over the whole step at once: {plan.scoring.microbatches:.3g} microbatches, "
            f"{plan.scoring.slots_used:.1%} full, the slowest data-parallel rank has {plan.scoring.slowest - 1:.1%} "
            "more to do than the mean"
        )
    if plan.entry == "rl":
        lines.append("every group of a step is trained on; the time to generate responses is not predicted")
    asked = assumed.mean_tokens
    if plan.stored is None and asked is not None and asked > plan.work.longest:
        lines.append(
            f"--mean-tokens {asked:,.0f} is more than the longest sequence has, so that all have {plan.work.longest:,}"
        )
    if plan.publishing is not None:
        lines.append(plan.publishing.told(device, assumed.link_efficiency))
    return lines


def _memory_in_words(memory: float) -> str:
    return (
        f"a device has the {memory / 1e9:,.0f} x 10^9 bytes of its name, which is conservative: drivers report a few "
        "percent more"
    )


def _fp8_in_words(plan: Plan) -> str:
    fp8 = plan.settings.fp8
    twice = copies(fp8.recipe, transposes=plan.device.fp8_transposes) == 2
    held = "along rows and along columns" if twice else "once"
    beside = "" if fp8.parameters else ", beside bfloat16"
    sent = "one byte each, all others two" if fp8.parameters else "in bfloat16"
    return (
        f"{fp8.recipe}: weights in FP8 lie in memory {held}{beside}, and are gathered {sent}; products keep their "
        "inputs in FP8 for the backward pass, norms, attention and gate and up theirs in bfloat16 (read from "
        "Transformer Engine 2.14.1 and Megatron-Core 0.16.1; no run has shown any of it yet)"
    )


def _adapters_in_words(plan: Plan) -> str:
    adapters = max(1, plan.device.per_node // plan.settings.parallel.tp)
    each = "1 adapter" if adapters == 1 else f"{adapters} adapters"
    return (
        f"between nodes gradients and weights of data parallelism go over {each} of a node at a time, one for each "
        "rank that a group has there (NCCL's rings, not measured); keys and values and pipeline stages over one"
    )


def _bf16_layers(settings: Settings) -> str:
    kept = settings.fp8.first_layers_bf16 + settings.fp8.last_layers_bf16
    return f" and {kept} layers" if kept else ""
