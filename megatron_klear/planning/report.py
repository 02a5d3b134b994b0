"""Plans for people, as tables, and for programs, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_klear.config.architecture import RecomputePolicy
from megatron_klear.planning.assumptions import assumptions_in_words
from megatron_klear.planning.estimate import Plan
from megatron_klear.planning.memory import StageMemory, kept_activations
from megatron_klear.planning.search import Candidate

_GB = 1e9


def print_plan(console: Console, plan: Plan) -> None:
    """Memory, traffic, time and what they rest on."""
    p, m = plan.settings.parallel, plan.settings.model
    _say(
        console,
        f"{plan.gpus} x {plan.device.title}: tp {p.tp}, pp {p.pp}, cp {p.cp}, dp {plan.dp}"
        f"{', sequence parallel' if p.sequence_parallel else ''}"
        f"{', distributed optimizer' if p.distributed_optimizer else ''}; recompute {m.recompute}; {m.dtype}",
    )
    console.print(memory_table(plan))
    _say(console, _policies_in_words(plan))
    limit = plan.device.memory_bytes
    if limit is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        _say(console, f"{verdict}: {plan.peak / _GB:.1f} of {limit / _GB:.0f} GB on the fullest device")
    if tokens := min(stage.kv_tokens for stage in plan.stages):
        _say(console, _cache_in_words(plan, tokens))
    host = max(stage.host_at_save for stage in plan.stages)
    divisor, unit = _unit(host)
    _say(
        console,
        f"host memory while a checkpoint is gathered: {host / divisor:.1f} {unit} for each rank that gathers, "
        f"{plan.host_at_save_of_a_node / divisor:.1f} {unit} on the node with most of them",
    )
    if moved := max(stage.host_while_generating for stage in plan.stages):
        _say(console, f"host memory while engines generate: {moved / _GB:.1f} GB per rank for what makes room for them")
    console.print(traffic_table(plan))
    console.print(time_table(plan))
    work = plan.work
    _say(
        console,
        f"a step: {work.sequences:,} sequences, {work.tokens:,.0f} tokens, {_count(work.updates, 'update')} of "
        f"{_count(plan.microbatches, 'microbatch', 'es')} per data-parallel rank; "
        f"pipeline bubble {plan.bubble_share:.0%}",
    )
    _say(
        console,
        f"expected: {plan.time.total:,.1f} s per step, {plan.tokens_per_second / plan.gpus:,.0f} tokens/s per device, "
        f"MFU {plan.mfu:.0%}{' of the bfloat16 rate' if plan.settings.fp8.on else ''}",
    )
    for line in assumptions_in_words(plan):
        _say(console, f"  assumed: {line}")


def activations_by_policy(plan: Plan) -> dict[str, float]:
    """Bytes of activations that the fullest stage of this layout would keep under each recompute policy."""
    return {
        policy: max(
            kept_activations(
                plan.settings, plan.kind, stage=stage.stage, microbatches=plan.microbatches, recompute=policy
            )
            for stage in plan.stages
        )
        for policy in get_args(RecomputePolicy)
    }


def _policies_in_words(plan: Plan) -> str:
    kept = activations_by_policy(plan)
    divisor, unit = _unit(*kept.values())
    told = ", ".join(f"{policy} {value / divisor:,.2f}" for policy, value in kept.items())
    return f"activations by recompute policy (model.recompute), {unit} on the stage that keeps most: {told}"


def _cache_in_words(plan: Plan, tokens: int) -> str:
    settings = plan.settings
    longest = settings.data.max_prompt_tokens + settings.rollout.max_response_tokens
    return (
        f"KV cache of an engine holds {tokens:,} tokens = {tokens / longest:,.1f} longest responses of "
        f"{longest:,} with their prompts, of {settings.rollout.batch_responses:,} at a time (rollout.batch_responses)"
    )


def memory_table(plan: Plan) -> Table:
    """One line per pipeline stage, on its worst rank (a GB is 10^9 bytes); columns without content left out."""
    columns: dict[str, list[float]] = {
        "weights": [stage.state.weights for stage in plan.stages],
        "gradients": [stage.state.gradients for stage in plan.stages],
        "optimizer": [stage.state.optimizer for stage in plan.stages],
        "FP8 copies": [stage.fp8_copies for stage in plan.stages],
        "activations": [stage.activations for stage in plan.stages],
        "layer workspace": [stage.workspace for stage in plan.stages],
        "head chunk": [stage.head_chunk for stage in plan.stages],
        "engine weights": [stage.engine_weights for stage in plan.stages],
        "KV cache": [stage.kv_cache for stage in plan.stages],
        "engine reserved": [stage.engine_reserved for stage in plan.stages],
        "publish": [stage.publish for stage in plan.stages],
        "reserved": [stage.reserved for stage in plan.stages],
        "training": [stage.while_training for stage in plan.stages],
        "generating": [stage.while_generating for stage in plan.stages] if plan.entry == "rl" else [],
    }
    shown = {name: values for name, values in columns.items() if any(values)}
    divisor, unit = _unit(plan.peak)
    table = Table(title=f"memory of the worst rank, {unit} (the larger of workspace and head chunk counts)")
    table.add_column("stage")
    table.add_column("in flight", justify="right")
    for name in shown:
        table.add_column(name, justify="right")
    for index, stage in enumerate(plan.stages):
        table.add_row(
            str(stage.stage), str(stage.in_flight), *(f"{values[index] / divisor:.2f}" for values in shown.values())
        )
    return table


def traffic_table(plan: Plan) -> Table:
    """Bytes that the busiest rank sends in a step."""
    traffic = plan.traffic
    cells = {
        "sequence parallel" if traffic.sequence else "tensor parallel": traffic.tensor,
        "context parallel": traffic.context,
        "pipeline": traffic.pipeline,
        "data parallel": traffic.data,
        **({"publish to engines": traffic.publish} if traffic.publish else {}),
    }
    divisor, unit = _unit(*cells.values())
    table = Table(title=f"sent by the busiest rank in a step, {unit}")
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value / divisor:,.1f}" for value in cells.values()))
    return table


def time_table(plan: Plan) -> Table:
    """Seconds of a step by part."""
    table = Table(title="expected seconds of a step, generation left out")
    parts = {field.name: getattr(plan.time, field.name) for field in dataclasses.fields(plan.time)}
    names = {"again": "computed again", "tensor": "tensor parallel", "context": "context parallel",
             "data": "data parallel"}  # fmt: skip
    for name in parts:
        table.add_column(names.get(name, name), justify="right")
    table.add_column("total", justify="right")
    table.add_row(*(f"{value:,.2f}" for value in parts.values()), f"{plan.time.total:,.2f}")
    return table


def print_layouts(console: Console, candidates: Sequence[Candidate], top: int, current: Plan | None) -> None:
    """The best layouts; the one that is set is marked, and shown where it stands when it is not among them."""
    table = Table(title=f"layouts that fit, fastest first ({len(candidates)} in all)")
    for name in ("", "tp", "pp", "cp", "dp", "recompute", "GB", "bubble", "s per step", "MFU"):
        table.add_column(name, justify="left" if name in ("", "recompute") else "right")
    for rank, candidate in enumerate(candidates, start=1):
        plan, p = candidate.plan, candidate.parallel
        is_current = current is not None and _same(plan, current)
        if rank > top and not is_current:
            continue
        table.add_row(
            f"{rank}{' <- set' if is_current else ''}", str(p.tp), str(p.pp), str(p.cp), str(plan.dp),
            candidate.recompute, f"{plan.peak / _GB:.1f}", f"{plan.bubble_share:.0%}", f"{plan.time.total:,.1f}",
            f"{plan.mfu:.0%}",
        )  # fmt: skip
    console.print(table)
    if candidates:
        _say(console, f"the first as settings: {candidates[0].overrides}")


def _same(one: Plan, other: Plan) -> bool:
    return one.settings.parallel == other.settings.parallel and one.settings.model == other.settings.model


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """All figures of a plan, bytes and seconds, for programs."""
    p = plan.settings.parallel
    return {
        "entry": plan.entry,
        "device": plan.device_name,
        "gpus": plan.gpus,
        "layout": {
            "tp": p.tp,
            "pp": p.pp,
            "cp": p.cp,
            "dp": plan.dp,
            "sequence_parallel": p.sequence_parallel,
            "distributed_optimizer": p.distributed_optimizer,
            "recompute": plan.settings.model.recompute,
        },
        "layers": plan.kind,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "host_at_save_of_a_node": plan.host_at_save_of_a_node,
        "stages": [_stage_as_json(stage) for stage in plan.stages],
        "activations_by_recompute": activations_by_policy(plan),
        "traffic_bytes": dataclasses.asdict(plan.traffic),
        "publish": None if plan.publishing is None else dataclasses.asdict(plan.publishing),
        "step": {
            "sequences": plan.work.sequences,
            "tokens": plan.work.tokens,
            "mean_tokens": plan.work.mean_tokens,
            "lengths_from": None if plan.stored is None else plan.stored.told,
            "updates": plan.work.updates,
            "microbatches": plan.microbatches,
            "slowest_rank": plan.even.slowest,
            "slots_used": plan.even.slots_used,
            "scoring": None if plan.scoring is None else dataclasses.asdict(plan.scoring),
            "flops": plan.flops.total,
            "bubble_share": plan.bubble_share,
            "seconds": {**dataclasses.asdict(plan.time), "total": plan.time.total},
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
        },
        "assumptions": assumptions_in_words(plan),
    }


def _stage_as_json(stage: StageMemory) -> dict[str, Any]:
    values = dataclasses.asdict(stage)
    state = values.pop("state")
    return {**values, **state, "peak": stage.peak}


def _count(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else ending}"


def _unit(*values: float) -> tuple[float, str]:
    """A unit in which the largest of some numbers of bytes is short."""
    return (1e9, "GB") if max(values, default=0.0) >= 1e9 else (1e6, "MB")


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
