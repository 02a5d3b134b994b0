"""Command line of the benchmark.

    python -m klear_kernels.linear_policy_loss.benchmark                       # on a GPU, every size
    python -m klear_kernels.linear_policy_loss.benchmark --device cpu --tokens 64 --words 1000 --hidden-size 64

On a CPU the same runs, with a wall clock and the growth of the resident set: good for its error columns, and for
seeing that it works; its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from klear_kernels.linear_policy_loss.benchmark import report
from klear_kernels.linear_policy_loss.benchmark.contestants import OPERATIONS, PRODUCTS, Contestant, contestants
from klear_kernels.linear_policy_loss.benchmark.measurement import measure
from klear_kernels.linear_policy_loss.benchmark.problem import make_inputs

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m klear_kernels.linear_policy_loss.benchmark",
        description="The fused head against full logits and other libraries: time, memory, errors against float64.",
    )
    result.add_argument("--device", default="cuda", help="cuda or cpu (default cuda)")
    result.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    result.add_argument("--hidden-size", type=_positive, default=4096, metavar="H")
    result.add_argument("--tokens", type=_positive, nargs="+", default=[1024, 8192, 32768, 32749], metavar="N")
    result.add_argument("--words", type=_positive, nargs="+", default=[151936, 75968, 37984, 18992], metavar="V")
    result.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    result.add_argument("--only", nargs="+", default=None, metavar="NAME", help="contestants, besides the products")
    result.add_argument("--with-entropy", action="store_true", help="ours also compute the entropy; no other does")
    result.add_argument("--rounds", type=_positive, default=20, help="timed runs of each contestant (default 20)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--out", type=Path, default=None, help="default benchmarks/results/linear_policy_loss_DEVICE.json"
    )
    result.add_argument(
        "--profile", action="store_true", help="one run of each contestant in --only between profiler marks, untimed"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when the table was written, 2 for options that cannot work."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device: got cuda, and torch sees no GPU; pass --device cpu and small sizes", file=sys.stderr)
        return 2
    dtype = DTYPES[options.dtype]
    entered = contestants(device, dtype, with_entropy=options.with_entropy)
    if options.only is not None:
        names = [contestant.name for contestant in entered]
        unknown = [name for name in options.only if name not in names]
        if unknown:
            print(f"--only: got {', '.join(unknown)}, allowed {', '.join(names)}", file=sys.stderr)
            return 2
        entered = [contestant for contestant in entered if contestant.name in (PRODUCTS, *options.only)]
    if options.profile:
        return _profile(options, entered, device, dtype)
    for contestant in entered:
        if contestant.missing is not None:
            hint = f" (pip install {contestant.package})" if "not installed" in contestant.missing else ""
            print(f"{contestant.name} takes no part: {contestant.missing}{hint}", file=sys.stderr)
    result: dict[str, Any] = {**report.describe(device), "with_entropy": options.with_entropy, "sizes": []}
    out = options.out or Path("benchmarks/results") / f"linear_policy_loss_{_slug(result['device'])}.json"
    for words in options.words:
        for tokens in options.tokens:
            size = _one_size(options, entered, tokens, words, device, dtype)
            print(report.table(size) + "\n", flush=True)
            if device.type == "cuda" and (tokens, words) == (32768, 151936):
                size["goals"] = report.goals(size)
                for goal in size["goals"]:
                    print(f"{goal['goal']}: {goal['value']}, limit {goal['limit']}, met: {goal['met']}")
            result["sizes"].append(size)
            report.write(out, result)  # after every size: a run that is stopped leaves what it has
    print(f"written to {out}")
    return 0


def _one_size(
    options: argparse.Namespace,
    entered: list[Contestant],
    tokens: int,
    words: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    inputs, exact, samples = make_inputs(
        tokens, words, options.hidden_size, dtype=dtype, device=device, seed=options.seed
    )
    probabilities = exact.logprobs.exp()
    marks = torch.quantile(probabilities, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=device)).tolist()
    rows: list[dict[str, Any]] = []
    for operation in options.operations:
        rows += measure(entered, operation, inputs, exact, rounds=options.rounds, seed=options.seed)
    return {
        "tokens": tokens,
        "words": words,
        "hidden_size": options.hidden_size,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "seed": options.seed,
        "samples": samples,
        "median_logsumexp": float(exact.logsumexp.median()),
        "label_probability": "{:.2g}, {:.2g}, {:.2g} (5th, 50th, 95th percentile)".format(*marks),
        "rounding": {operation: report.rounding(exact, operation) for operation in options.operations},
        "rows": rows,
    }


def _profile(options: argparse.Namespace, entered: list[Contestant], device: torch.device, dtype: torch.dtype) -> int:
    """For tools/profile_kernels.sh: warm up outside the profiler's window, run once inside."""
    if options.only is None or device.type != "cuda":
        print("--profile: needs --device cuda and --only NAME", file=sys.stderr)
        return 2
    inputs, _, _ = make_inputs(
        options.tokens[0], options.words[0], options.hidden_size, dtype=dtype, device=device, seed=options.seed
    )
    for contestant in entered:
        if contestant.name not in options.only:
            continue
        if contestant.missing is not None:
            print(f"--only: {contestant.name} takes no part: {contestant.missing}", file=sys.stderr)
            return 2
        run = contestant.runs.get(options.operations[0])
        if run is None:
            print(f"--operations: {contestant.name} does not compute {options.operations[0]}", file=sys.stderr)
            return 2
        for _ in range(2):
            contestant.prepare(inputs)
            run(inputs)
        contestant.prepare(inputs)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        run(inputs)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, allowed 1 or more")
    return value


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
