"""How far plans are from a device: memory of activations, and time of an update, for every recompute policy.

    python benchmarks/planner_error.py [--preset qwen3-8b] [--layers 4] [--tokens 32768] [--rounds 5]
                                       [--fp8 tensorwise [--fp8-parameters]]

One process trains a model with the preset's widths and `--layers` layers on one full microbatch of two sequences per
update. On a GPU the peak of torch's allocator above weights, gradients and optimizer is compared with the plan's
activations, workspace and head chunk, and copies of weights in FP8; on a CPU, which keeps no such account, the storages
that autograd keeps are, by torch's saved-tensor hooks. Time is compared with the plan's at the data sheet's rate and
the assumed efficiency; a CPU has no data sheet, so there it is the process's CPU time at the rate of a large product,
both measured here. The share of the measured product rate that an update reaches is printed, too: small models are far
from it on any device.

Prints a table, and writes it as JSON to benchmarks/results/planner_error_DEVICE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from megatron_klear import parallel
from megatron_klear.algorithm import PolicyObjective
from megatron_klear.config import (
    PRESETS,
    Fp8Settings,
    ModelSettings,
    OptimizerSettings,
    PackingSettings,
    RunSettings,
    Settings,
    SftSettings,
    TokenizerSettings,
)
from megatron_klear.config.precision import Recipe
from megatron_klear.errors import ConfigError
from megatron_klear.model import HeadRequest, build_qwen3, forward_microbatch
from megatron_klear.packing import pack
from megatron_klear.planning import DEVICES, Assumptions, make_plan
from megatron_klear.planning.activations import head_bytes, index_bytes, layer_bytes, layer_kind, widths
from megatron_klear.planning.memory import trainer_state
from megatron_klear.records import ParallelContext, TrainSequence
from megatron_klear.trainer import Trainer, make_trainable

RESULTS = Path(__file__).with_name("results")
POLICIES = ("none", "selective", "full")
SEQUENCES = 2


def device_name(context: ParallelContext) -> str:
    """The planner's name of this device; H100 where it has none."""
    if context.device.type == "cpu":
        return "cpu"
    title = torch.cuda.get_device_name().lower()
    return next((name for name in DEVICES if name in title), "h100")


def now(context: ParallelContext) -> float:
    """Seconds, when all work has ended: of the clock on a GPU, of this process on a CPU, which others may be using."""
    if context.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(context: ParallelContext) -> float:
    """Floating-point operations per second of one large product in the model's data type."""
    on_cpu = context.device.type == "cpu"
    size, dtype = (1024, torch.float32) if on_cpu else (8192, torch.bfloat16)
    left = torch.randn(size, size, dtype=dtype, device=context.device)
    best = float("inf")
    for _ in range(5):
        start = now(context)
        left @ left
        best = min(best, now(context) - start)
    return 2.0 * size**3 / best


def settings_of(
    preset: str, layers: int, tokens: int, recompute: str, *, on_cpu: bool, fp8: Fp8Settings | None = None
) -> Settings:
    """The preset with fewer layers; float32 and Megatron's own layers on a CPU, the defaults on a GPU."""
    sizes = dataclasses.asdict(dataclasses.replace(PRESETS[preset], num_layers=layers))
    sizes["max_position_embeddings"] = max(tokens, sizes["max_position_embeddings"])
    how = {"dtype": "float32", "layer_spec": "local"} if on_cpu else {}
    return Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(**sizes, **how, recompute=recompute),  # type: ignore[arg-type]
        packing=PackingSettings(token_budget=tokens),
        sft=SftSettings(steps=1, batch_sequences=SEQUENCES),
        optimizer=OptimizerSettings(lr=1e-6),
        fp8=fp8 or Fp8Settings(),
    )


def sequences(settings: Settings) -> list[TrainSequence]:
    """Two sequences that fill a microbatch together, every token but the first with a loss."""
    rng, length = np.random.default_rng(0), settings.packing.token_budget // SEQUENCES
    zeros, trained = np.zeros(length, dtype=np.float32), np.full(length, 1 / length, dtype=np.float32)
    trained[0] = 0.0
    return [
        TrainSequence(
            sequence_id=f"s{number}",
            token_ids=rng.integers(0, settings.architecture.vocab_size, length),
            policy_weight=zeros,
            lm_weight=trained,
            advantages=zeros,
            old_logprobs=zeros,
            rollout_logprobs=zeros,
        )
        for number in range(SEQUENCES)
    ]


def kept_bytes(trainer: Trainer) -> float:
    """Storages that the forward pass of one microbatch keeps, those of parameters left out."""
    context, model = trainer.context, trainer.trainable.model
    batch = pack(sequences(trainer.settings), cp_rank=0, cp_size=1, tp_size=1, device=context.device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    request = HeadRequest(batch=batch, objective=PolicyObjective())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), parallel.cuda_means_cpu():
        forward_microbatch(trainer.trainable.ddp, request, context, transformer_engine=model.layer_kind == "te")
    return float(sum(tensor.untyped_storage().nbytes() for tensor in found.values()))


def measure(settings: Settings, context: ParallelContext, rate: float, rounds: int) -> dict[str, float]:
    """Predicted and measured memory and time of one policy."""
    on_cpu, name = context.device.type == "cpu", device_name(context)
    model = build_qwen3(settings.architecture, settings.model, settings.parallel, context, fp8=settings.fp8)
    trainable = make_trainable(model, settings.optimizer, settings.parallel, total_updates=rounds + 2)
    trainer = Trainer(trainable, settings.architecture, settings, context)
    kind, w, recompute = layer_kind(settings, name), widths(settings), settings.model.recompute
    if not on_cpu and kind != model.layer_kind:
        kind = "local"
    assumed = Assumptions(
        efficiency=rate / DEVICES[name].flops if on_cpu else Assumptions().efficiency,
        mean_tokens=settings.packing.token_budget / SEQUENCES,
    )
    plan = make_plan(settings, entry="sft", gpus=1, device_name=name, assumptions=assumed)
    seconds = []
    for _ in range(rounds + 1):
        start = now(context)
        trainer.update(sequences(settings), PolicyObjective(), step=1)
        seconds.append(now(context) - start)
    measured_seconds = statistics.median(seconds[1:])
    stage = plan.stages[0]
    if on_cpu:
        predicted = settings.architecture.num_layers * layer_bytes(w, kind).kept(recompute)
        predicted += index_bytes(w, kind, recompute, first_stage=True) + head_bytes(w, kind)
        measured = kept_bytes(trainer)
    else:
        predicted = stage.fp8_copies + stage.activations + max(stage.workspace, stage.head_chunk)
        torch.cuda.reset_peak_memory_stats()
        trainer.update(sequences(settings), PolicyObjective(), step=1)
        measured = torch.cuda.max_memory_allocated() - float(trainer_state(settings, stage=0, dp=1).total)
    work = (plan.time.compute + plan.time.again) * DEVICES[name].flops * assumed.efficiency
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "predicted_seconds": plan.time.total,
        "measured_seconds": measured_seconds,
        "share_of_product_rate": work / measured_seconds / rate,
    }


def run(preset: str, layers: int, tokens: int, rounds: int, fp8: Fp8Settings | None = None) -> dict[str, Any]:
    """All policies on this device, with a table."""
    context = parallel.start(parallel_settings())
    on_cpu, rate = context.device.type == "cpu", product_rate(context)
    print(f"{'recompute':10s}{'planned':>12s}{'measured':>12s}{'error':>9s}{'planned':>11s}{'measured':>11s}{'error':>9s}"
          f"{'of product rate':>17s}")  # fmt: skip
    rows = {}
    for recompute in POLICIES:
        row = measure(settings_of(preset, layers, tokens, recompute, on_cpu=on_cpu, fp8=fp8), context, rate, rounds)
        memory, seconds = (row[f"predicted_{u}"] / row[f"measured_{u}"] - 1 for u in ("bytes", "seconds"))
        rows[recompute] = row | {"bytes_error": memory, "seconds_error": seconds}
        print(f"{recompute:10s}{row['predicted_bytes'] / 1e6:9.1f} MB{row['measured_bytes'] / 1e6:9.1f} MB"
              f"{memory:+9.2%}{row['predicted_seconds']:9.3f} s{row['measured_seconds']:9.3f} s{seconds:+9.1%}"
              f"{row['share_of_product_rate']:17.1%}")  # fmt: skip
        if not on_cpu:
            torch.cuda.empty_cache()
    title = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name()
    return {
        "device": title,
        "layers_of": device_name(context),
        "torch": torch.__version__,
        "product_flops_per_second": rate,
        "arguments": {"preset": preset, "layers": layers, "tokens": tokens, "rounds": rounds},
        "fp8": dataclasses.asdict(fp8 or Fp8Settings()),
        "rows": rows,
    }


def parallel_settings() -> Any:
    """One process."""
    return Settings(run=RunSettings(dir="unused"), tokenizer=TokenizerSettings(dir="unused")).parallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="qwen3-8b", help="whose widths")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of a microbatch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp8", choices=get_args(Recipe), default="none", help="recipe (fp8.recipe); on a GPU")
    parser.add_argument("--fp8-parameters", action="store_true", help="weights stored in FP8 (fp8.parameters)")
    arguments = parser.parse_args()
    fp8 = Fp8Settings(recipe=arguments.fp8, parameters=arguments.fp8_parameters)
    try:
        found = run(arguments.preset, arguments.layers, arguments.tokens, arguments.rounds, fp8)
    except ConfigError as error:
        sys.exit(str(error))
    RESULTS.mkdir(exist_ok=True)
    kind = f"_{fp8.recipe}{'_parameters' if fp8.parameters else ''}" if fp8.on else ""
    place = RESULTS / f"planner_error_{found['layers_of']}{kind}.json"
    place.write_text(json.dumps(found, indent=1) + "\n")
    parallel.stop()


if __name__ == "__main__":
    main()
