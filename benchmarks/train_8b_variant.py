"""One variant of `train_8b.py` in a process of its own: `train_8b_variant.py JOB_AS_JSON OUT`.

OUT is written anew after every update, so that a process that runs out of memory or of time leaves what it has done.
The exit status says why it ended; the last line of standard error says it in words.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DONE, FAILED, NOT_HERE, NO_MEMORY = 0, 1, 2, 75
_ALLOCATION_FAILURES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "cudaErrorMemory")
_TOLD_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train.

    Attributes:
        variant: `bf16` or a recipe, with `+parameters` for weights stored in FP8.
        layers: of the model.
        tokens: of an update.
        sequences: equal ones that share them.
        recompute: activations that are computed again (model.recompute).
        warmup, updates: untimed updates, and timed ones after them.
        ends_at: seconds since 1970 after which no further update is begun.
        smoke: a tiny model.
    """

    variant: str
    layers: int
    tokens: int
    sequences: int
    recompute: str
    warmup: int
    updates: int
    ends_at: float
    smoke: bool


def measure(job: Job, out: Path) -> None:
    """Train, and keep writing what there is: seconds of each timed update, losses, operations, peak memory."""
    import torch

    from megatron_klear import parallel
    from megatron_klear.algorithm import PolicyObjective
    from megatron_klear.config import (
        Fp8Settings,
        ModelSettings,
        OptimizerSettings,
        PackingSettings,
        RunSettings,
        Settings,
        TokenizerSettings,
    )  # fmt: skip
    from megatron_klear.model import build_qwen3
    from megatron_klear.model.layer_spec import describe_attention
    from megatron_klear.observe.memory import device_peak_bytes, host_peak_bytes, reset_peaks
    from megatron_klear.trainer import Trainer, make_trainable, sft_minibatch

    recipe, _, stored = job.variant.partition("+")
    settings = Settings(
        run=RunSettings(dir="unused"),
        tokenizer=TokenizerSettings(dir="unused"),
        model=ModelSettings(
            preset="qwen3-tiny" if job.smoke else "qwen3-8b",
            num_layers=job.layers,
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            recompute=job.recompute,  # type: ignore[arg-type]
        ),
        fp8=Fp8Settings(recipe="none" if recipe == "bf16" else recipe, parameters=stored == "parameters"),  # type: ignore[arg-type]
        packing=PackingSettings(token_budget=job.tokens),
    )
    context = parallel.start(settings.parallel, seed=1)
    torch.manual_seed(1)
    arch = settings.architecture
    model = build_qwen3(arch, settings.model, settings.parallel, context, fp8=settings.fp8)
    rate = 1e-2 if job.smoke else 1e-4
    trainable = make_trainable(model, OptimizerSettings(lr=rate), settings.parallel, total_updates=1000)
    trainer = Trainer(trainable, arch, settings, context)
    reset_peaks()
    seconds: list[float] = []
    losses: list[float] = []
    told = time.monotonic()
    for update in range(job.warmup + job.updates):
        rows = sft_minibatch(text(job, arch.vocab_size, update), "token")
        trainer.take_flops()
        start = time.perf_counter()
        losses.append(trainer.update(rows, PolicyObjective(), step=update + 1).loss)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        if update >= job.warmup:
            seconds.append(time.perf_counter() - start)
        peak = device_peak_bytes()
        result = {
            "layers": arch.num_layers,
            "dtype": settings.model.dtype,
            "seconds": seconds,
            "losses": losses,
            "flops": dataclasses.asdict(trainer.take_flops()),
            "peak_bytes": host_peak_bytes() if peak is None else peak,
            "attention": describe_attention(settings.model, model.layer_kind, context.device),
            "layer_kind": model.layer_kind,
        }
        written = out.with_suffix(".new")
        written.write_text(json.dumps(result))
        os.replace(written, out)
        if update in (0, job.warmup) or time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            print(
                f"  {job.variant}, {job.layers} layers: update {update + 1} of {job.warmup + job.updates}, "
                f"{time.perf_counter() - start:.2f} s, loss {losses[-1]:.4f}",
                flush=True,
            )
        if time.time() > job.ends_at:
            break
    parallel.stop()


def text(job: Job, vocab_size: int, update: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Rows of an update, the same for every variant and every token trained: words of very different frequency, half of
    them decided by the word before, so that there is something to learn in a few updates."""
    rng = np.random.default_rng([7, update])
    length = job.tokens // job.sequences
    successor = np.random.default_rng(7).permutation(vocab_size)
    mask = np.arange(length) > 0
    rows = []
    for number in range(job.sequences):
        words = np.minimum(rng.zipf(1.3, length) - 1, vocab_size - 1)
        follows = rng.random(length) < 0.5
        for place in np.flatnonzero(follows[1:]) + 1:
            words[place] = successor[words[place - 1]]
        rows.append((f"u{update}s{number}", words.astype(np.int64), mask))
    return rows


def is_for_want_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not do: torch's own, or a library's."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _ALLOCATION_FAILURES)


def describe_device() -> dict[str, Any]:
    """The device, what it has, and its rates: measured, and by its data sheet where that is known."""
    import torch

    from megatron_klear.observe.datasheets import datasheet_rate
    from megatron_klear.observe.device_rate import device_name, product_rate

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = device_name(device)
    sheet = datasheet_rate(name)
    return {
        "device": name,
        "memory_bytes": torch.cuda.mem_get_info()[1] if on_gpu else None,
        "free_bytes": torch.cuda.mem_get_info()[0] if on_gpu else None,
        "cuda": torch.version.cuda,
        "measured_tflops": product_rate(device, dtype) / 1e12,
        "measured_dtype": str(dtype),
        "datasheet_bf16_tflops": None if sheet is None else sheet / 1e12,
    }


def main(job: str, out: Path) -> int:
    """Do a job, or describe the device; returns the exit status."""
    from megatron_klear.errors import ConfigError

    try:
        if job == "device":
            out.write_text(json.dumps(describe_device()))
        else:
            measure(Job(**json.loads(job)), out)
    except ConfigError as error:
        print("; ".join(error.problems), file=sys.stderr)
        return NOT_HERE
    except Exception as error:
        told = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if is_for_want_of_memory(error):
            print(told, file=sys.stderr)
            return NO_MEMORY
        import traceback

        traceback.print_exc()
        print(told, file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
