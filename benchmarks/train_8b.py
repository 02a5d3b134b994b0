"""Training speed of a Qwen3-8B-shaped model with as many layers as fit on one device: bfloat16 and each FP8 recipe.

    python benchmarks/train_8b.py [--tokens 32768] [--sequences 1] [--recompute none] [--variants bf16 tensorwise ...]
                                  [--layers N] [--updates N] [--out FILE]
    python benchmarks/train_8b.py --smoke          # a tiny model, on a CPU too: shows that it runs, not how fast

Real updates by the trainer: forward, fused head, backward, clipping, AdamW with float32 weights. Every variant is a
process of its own. Without --layers the number of layers is sought with the first variant: as many as memory should
hold, one less after every failure for lack of it; the other variants take the same. Model operations are counted as in
every run (observe/flops.py): causal pairs only, no recomputation, no optimizer. FP8 rates are set against the bfloat16
rates of the device, measured and by its data sheet, so that variants can be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("bf16", "delayed", "tensorwise", "blockwise", "tensorwise+parameters")
NO_MEMORY, NOT_HERE = 75, 2
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton", "nvidia-cudnn-cu13")
TRAINED_BYTES = 18
"""Per weight: 2 in bfloat16, 4 of gradient, 12 of float32 weight and AdamW's moments."""
ACTIVATIONS_BYTES = {"none": 34, "selective": 34, "full": 2.2}
"""Per token and channel of a layer, roughly; only a first guess, since a failure is followed by one layer less."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some updates of one variant in this process.

    Returns seconds of each timed update, losses, model operations, peak memory and what was used.
    """
    import torch

    from megatron_klear import parallel
    from megatron_klear.algorithm import PolicyObjective
    from megatron_klear.config import OptimizerSettings, PackingSettings, RunSettings, Settings, TokenizerSettings
    from megatron_klear.model import build_qwen3
    from megatron_klear.model.layer_spec import describe_attention
    from megatron_klear.observe.memory import device_peak_bytes, host_peak_bytes, reset_peaks
    from megatron_klear.trainer import Trainer, make_trainable

    model_settings, fp8 = variant_settings(arguments)
    settings = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=model_settings,
        fp8=fp8,
        packing=PackingSettings(token_budget=arguments.tokens),
    )
    context = parallel.start(settings.parallel, seed=1)
    torch.manual_seed(1)
    arch = settings.architecture
    model = build_qwen3(arch, settings.model, settings.parallel, context, fp8=fp8)
    trainable = make_trainable(model, OptimizerSettings(lr=1e-5), settings.parallel, total_updates=1000)
    trainer = Trainer(trainable, arch, settings, context)
    rows = batch(arguments, arch.vocab_size)
    reset_peaks()
    seconds, losses = [], []
    for update in range(arguments.warmup + arguments.updates):
        trainer.take_flops()
        start = time.perf_counter()
        losses.append(trainer.update(rows, PolicyObjective(), step=update + 1).loss)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = device_peak_bytes()
    result = {
        "layers": arch.num_layers,
        "dtype": settings.model.dtype,
        "seconds": seconds[arguments.warmup :],
        "losses": losses,
        "flops": dataclasses.asdict(trainer.take_flops()),
        "peak_bytes": host_peak_bytes() if peak is None else peak,
        "attention": describe_attention(settings.model, model.layer_kind, context.device),
        "layer_kind": model.layer_kind,
    }
    parallel.stop()
    return result


def variant_settings(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and FP8 settings of the variant that the arguments name."""
    import torch

    from megatron_klear.config import Fp8Settings, ModelSettings

    recipe, _, stored = arguments.one.partition("+")
    fp8 = Fp8Settings(recipe="none" if recipe == "bf16" else recipe, parameters=stored == "parameters")
    preset = "qwen3-tiny" if arguments.smoke else "qwen3-8b"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return ModelSettings(preset=preset, num_layers=arguments.layers, dtype=dtype, recompute=arguments.recompute), fp8


def batch(arguments: argparse.Namespace, vocab_size: int) -> list[Any]:
    """One pack of random tokens in equal sequences, every token trained."""
    import numpy as np

    from megatron_klear.trainer import sft_minibatch

    rng = np.random.default_rng(0)
    length = arguments.tokens // arguments.sequences
    rows = []
    for number in range(arguments.sequences):
        mask = np.ones(length, dtype=bool)
        mask[0] = False
        rows.append((f"s{number}", rng.integers(0, vocab_size, length), mask))
    return sft_minibatch(rows, "token")


def layers_that_fit(arguments: argparse.Namespace) -> int:
    """A first guess at the number of layers that the device's memory holds."""
    import torch

    from megatron_klear.config import PRESETS
    from megatron_klear.observe.flops import projection_parameters

    arch = PRESETS["qwen3-tiny" if arguments.smoke else "qwen3-8b"]
    if not torch.cuda.is_available():
        return min(arch.num_layers, 2)
    free = torch.cuda.get_device_properties(0).total_memory * 0.94 - 2e9
    free -= 2 * arch.vocab_size * arch.hidden_size * TRAINED_BYTES
    activations = ACTIVATIONS_BYTES[arguments.recompute] * arguments.tokens * arch.hidden_size
    per_layer = projection_parameters(arch) * TRAINED_BYTES + activations
    if arguments.recompute == "full":
        free -= ACTIVATIONS_BYTES["none"] * arguments.tokens * arch.hidden_size  # the layer that is computed again
    return max(1, min(arch.num_layers, int(free / per_layer)))


def run_one(arguments: argparse.Namespace, variant: str, layers: int) -> tuple[int, dict[str, Any]]:
    """A variant in a process of its own: exit status and result, with the reason where there is none."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        command = [sys.executable, __file__, "--one", variant, "--layers", str(layers), "--one-out", out.name]
        for name in ("tokens", "sequences", "recompute", "updates", "warmup"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run([*command, *(["--smoke"] if arguments.smoke else [])], capture_output=True, text=True)
        if done.returncode == 0:
            return 0, json.load(out)
    last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    return done.returncode, {"problem": last}


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants with the same number of layers; one that cannot run here has its reason in place of numbers."""
    layers = arguments.layers or layers_that_fit(arguments)
    rows = []
    for variant in arguments.variants:
        status, result = run_one(arguments, variant, layers)
        while status == NO_MEMORY and not rows and not arguments.layers and layers > 1:
            layers -= 1
            print(f"{variant}: not enough memory, trying {layers} layers", file=sys.stderr)
            status, result = run_one(arguments, variant, layers)
        rows.append({"variant": variant, **result})
        print(f"{variant}: {result.get('problem', 'done')}", file=sys.stderr)
    return rows


def rated(rows: list[dict[str, Any]], device: Any) -> dict[str, Any]:
    """Adds rates to the rows; returns what the device can do."""
    import torch

    from megatron_klear.observe.device_rate import datasheet_rate, device_name, product_rate

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name, measured = device_name(device), product_rate(device, dtype)
    sheet = datasheet_rate(name)
    for row in rows:
        if "problem" in row:
            continue
        rate = sum(row["flops"].values()) / statistics.median(row["seconds"])
        row.update(model_tflops=rate / 1e12, mfu_measured=rate / measured)
        row["mfu_datasheet"] = None if sheet is None else rate / sheet
    return {
        "device": name,
        "measured_tflops": measured / 1e12,
        "measured_dtype": str(dtype),
        "datasheet_bf16_tflops": None if sheet is None else sheet / 1e12,
    }


def print_table(rows: list[dict[str, Any]], about: dict[str, Any], tokens: int) -> None:
    """The figures for people."""
    sheet = about["datasheet_bf16_tflops"]
    known = "not known" if sheet is None else f"{sheet:.0f}"
    print(f"\n{about['device']}: products at {about['measured_tflops']:.4g} TFLOP/s measured, data sheet {known}")
    heads = ("layers", "s/update", "tokens/s", "TFLOP/s", "MFU", "of sheet", "GiB")
    print(f"{'variant':<24}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        if "problem" in row:
            print(f"{row['variant']:<24}{row['problem']}")
            continue
        seconds = statistics.median(row["seconds"])
        share = "" if row["mfu_datasheet"] is None else f"{row['mfu_datasheet']:.1%}"
        name = f"{row['variant']} ({row['dtype']})" if row["dtype"] != "bfloat16" else row["variant"]
        print(
            f"{name:<24}{row['layers']:>10}{seconds:>10.3f}{tokens / seconds:>10.0f}{row['model_tflops']:>10.4g}"
            f"{row['mfu_measured']:>10.1%}{share:>10}{row['peak_bytes'] / 2**30:>10.2f}"
        )


def versions() -> dict[str, str]:
    """Of what computes, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _one(arguments: argparse.Namespace) -> int:
    import torch

    from megatron_klear.errors import ConfigError

    try:
        result = measure(arguments)
    except ConfigError as error:
        print("; ".join(error.problems), file=sys.stderr)
        return NOT_HERE
    except torch.cuda.OutOfMemoryError as error:
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return NO_MEMORY
    Path(arguments.one_out).write_text(json.dumps(result))
    return 0


def main() -> int:
    """Run, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=None, help="of an update (default: 32768; with --smoke 256)")
    parser.add_argument("--sequences", type=int, default=1, help="equal sequences that share them (default: 1)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=None, help="default: as many as fit")
    parser.add_argument("--updates", type=int, default=8, help="timed ones (default: 8)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed ones before (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; runs on a CPU too")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/train_8b_<device>.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--one-out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (256 if arguments.smoke else 32768)
    if arguments.one:
        return _one(arguments)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.smoke:
        parser.error("no GPU: an 8B-shaped model at this length is for one; --smoke shows that the script runs")
    rows = run_all(arguments)
    about = rated(rows, device)
    print_table(rows, about, arguments.tokens)
    short = re.sub(r"[^a-z0-9]+", "_", about["device"].lower().removeprefix("nvidia ")).strip("_")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"train_8b_{short}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), **about, "versions": versions(),
        "smoke": arguments.smoke, "tokens": arguments.tokens, "sequences": arguments.sequences,
        "recompute": arguments.recompute, "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {out}")
    return 0 if any("problem" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
