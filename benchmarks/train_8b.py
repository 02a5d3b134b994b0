"""Training speed of a Qwen3-8B-shaped model with as many layers as fit on one device: bfloat16 and each FP8 recipe.

    python benchmarks/train_8b.py [--minutes 10] [--tokens 32768] [--sequences 1] [--recompute none]
                                  [--variants bf16 tensorwise ...] [--layers N] [--updates N] [--out FILE]
    python benchmarks/train_8b.py --smoke          # a tiny model, on a CPU too: shows that it runs, not how fast

Real updates by the trainer: forward, fused head, backward, clipping, AdamW with float32 weights. Every variant is a
process of its own. The first tries a guess of the layers that memory holds (or --layers), the others begin where the
one before ended; after a failure for lack of memory there is one less, and after three failures two, four and so on, of
which a few updates are tried only; from what fits the search goes up again by halves, as long as the variant's part of
the time does for all updates as well. So variants may have different numbers of layers, which stand beside their
figures: rates per device can be compared, seconds and tokens/s only at the same number. bf16 is measured again at each
number that an FP8 variant ended with.

Losses: an FP8 variant follows bf16 when, at the same layers, text and first weights, the loss of no update differs by
more than 1 % from that of bf16. The default, 50 timed updates, is what the figures and this comparison rest on.

Model operations are counted as in every run (observe/flops.py): causal pairs only, no recomputation, no optimizer. All
rates are set against the bfloat16 rates of the device, measured and by its data sheet, so that they can be compared.
The result file is written after every attempt. Time left is shared among the variants still to come; one that is cut
short keeps the updates it has done.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train_8b_variant import DONE, NO_MEMORY, Job

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("bf16", "tensorwise", "blockwise", "delayed", "tensorwise+parameters")
PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "transformer-engine-cu13", "flash-attn",
    "apex", "triton", "nvidia-cudnn-cu13",
)  # fmt: skip
TRAINED_BYTES = 18
"""Per weight: 2 in bfloat16, 4 of gradient, 12 of float32 weight and AdamW's moments."""
ACTIVATIONS_BYTES = {"none": 34, "selective": 34, "full": 2.2}
"""Per token and channel of a layer, roughly; only a first guess, since a failure is followed by fewer layers."""
LOSS_BAND = 0.01
"""Largest relative difference from bf16 of the loss of an update."""
LOSS_UPDATES = 50
AIM_BF16_SHARE, AIM_FP8_TFLOPS = 0.5, 700.0
LEAST_SECONDS = 40.0
"""Less time than this is not worth the start of a process."""
_GRACE_SECONDS = 60.0
_SINGLE_FAILURES = 3
"""Failures for lack of memory after which there is one layer less; then the guess was bad, and steps grow."""
_PROBE_WARMUP, _PROBE_UPDATES = 1, 2
"""Updates that show whether memory does: the optimizer's state is there from the first one's end on."""
_LOG_LINES = 15

Row = dict[str, Any]
RunChild = Callable[[str, float], tuple[int, Row | None, str]]
"""Runs a job (or `device`) for at most so many seconds: exit status, what it wrote, the end of its standard error."""


def run_child(job: str, seconds: float) -> tuple[int, Row | None, str]:
    """A job in a process of its own, which is killed when it has not ended a minute after its time."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # memory is nearly full: gaps in it would be missed
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "stderr"
        with log.open("wb") as stream:
            command = [sys.executable, str(ROOT / "benchmarks" / "train_8b_variant.py"), job, str(out)]
            try:
                status = subprocess.run(
                    command, env=environment, stderr=stream, timeout=seconds + _GRACE_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                status = -9
        lines = log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        return status, json.loads(out.read_text()) if out.is_file() else None, "\n".join(lines)


class LayerSearch:
    """The most layers that memory holds, from a guess downwards and up again.

    Args:
        first: the guess.

    Attributes:
        layers: to try next.
        fits: the most that are known to fit, 0 if none.
    """

    def __init__(self, first: int) -> None:
        self.layers, self.fits = first, 0
        self._fails = first + 1
        self._less, self._failures = 1, 0

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to find out between what fits and what does not."""
        return 0 < self.fits == self._fails - 1

    @property
    def is_probe(self) -> bool:
        """Whether the next try only tells where memory ends: more may fit, as steps were longer than one."""
        return self._failures > _SINGLE_FAILURES and not self.is_settled

    def failed(self) -> bool:
        """The last try had too little memory; False when there is nothing left to try."""
        self._fails = self.layers
        if self.fits >= self.layers:  # in all updates what a few had memory for
            self.fits, self._failures, self._less = 0, 0, 1
        if self.fits:
            self.layers = (self.fits + self._fails) // 2
            return True
        if self.layers == 1:
            return False
        self.layers = max(1, self.layers - self._less)
        self._failures += 1
        self._less *= 2 if self._failures >= _SINGLE_FAILURES else 1
        return True

    def fitted(self) -> None:
        """The last try had memory enough."""
        self.fits = self.layers
        self.layers = (self.fits + self._fails) // 2

    def settle(self) -> None:
        """Be content with what fits."""
        self.layers, self._fails = self.fits, self.fits + 1


class Plan:
    """Runs the variants within the time there is.

    Args:
        arguments: of the command.
        run: runs a job.
        save: called with all rows after every attempt.
        clock: seconds.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        *,
        run: RunChild = run_child,
        save: Callable[[list[Row]], None] = lambda rows: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._arguments, self._run, self._save, self._clock = arguments, run, save, clock
        self._ends_at = clock() + 60.0 * arguments.minutes
        self.rows: list[Row] = []

    def left(self) -> float:
        """Seconds left."""
        return self._ends_at - self._clock()

    def run_all(self, first_guess: int) -> list[Row]:
        """All variants, and bf16 again at the layers of those that took fewer; a row each, with figures or a reason."""
        variants: Sequence[str] = self._arguments.variants
        layers = self._arguments.layers or first_guess
        for place, variant in enumerate(variants):
            self._row(variant, layers, share=len(variants) - place)
            done = [row["layers"] for row in self.rows if row["seconds"]]
            layers = min([layers, *done])  # what memory did not hold for one will rarely do for the next
        if "bf16" in variants:
            have = {row["layers"] for row in self.rows if row["variant"] == "bf16" and row["seconds"]}
            for lacking in sorted({row["layers"] for row in self.rows if row["seconds"]} - have, reverse=True):
                self._row("bf16", lacking, share=1)
        for row in self.rows:
            compare_losses(row, self.rows)
        self._save(self.rows)
        return self.rows

    def _row(self, variant: str, layers: int, share: int) -> None:
        """Try a variant with fewer and fewer layers until it runs, and with more where that was too few."""
        row: Row = {"variant": variant, "layers": layers, "seconds": [], "attempts": []}
        self.rows.append(row)
        search = LayerSearch(layers)
        part_ends_at = self._clock() + self.left() / share
        while True:
            left, layers, is_probe = self.left(), search.layers, search.is_probe
            if left < LEAST_SECONDS and not self._arguments.smoke:
                if not row["seconds"]:
                    row["problem"] = f"no time was left ({max(0.0, left):.0f} s)"
                break
            seconds = left / share
            what = f"{variant}, {layers} layers{', a few updates' if is_probe else ''}"
            print(f"{what}: {left:.0f} s left, at most {seconds:.0f} s for this one", flush=True)
            began = self._clock()
            job = self._job(variant, layers, seconds, is_probe)
            status, result, log = self._run(json.dumps(dataclasses.asdict(job)), seconds)
            took = self._clock() - began
            last = (log.splitlines() or [f"ended with status {status}"])[-1]
            has_run = bool(result and result["seconds"]) and status != NO_MEMORY
            if has_run and not is_probe:
                row.pop("cut_short", None)
                row.update(result or {})
                if status != DONE:
                    row.update(cut_short=last, log=log)
                break
            row["attempts"].append({"layers": layers, "status": status, "problem": "fits" if has_run else last})
            self._save(self.rows)
            if has_run:  # which are figures, too, if no time is left for better ones
                row.update(result or {})
                row["cut_short"] = "a few updates only: there was no time for all of them"
                search.fitted()
            elif status != NO_MEMORY and search.fits and is_probe:
                search.settle()
            elif status != NO_MEMORY or not search.failed():
                problem = last if status != -9 else "its time was over before a timed update"
                row.update({"cut_short" if row["seconds"] else "problem": problem, "log": log})
                break
            if not row["seconds"]:
                row["layers"] = search.layers
            elif search.is_probe and self._clock() + took + self._seconds_for_all(row) > part_ends_at:
                search.settle()
            said = "it fits" if has_run else f"{last}\n  it does not"
            print(f"  {said}: {search.layers} layers next", flush=True)
        print(f"  {variant}: {row.get('problem', 'done')}", flush=True)
        self._save(self.rows)

    def _seconds_for_all(self, row: Row) -> float:
        """Of all updates, by those of a probe; the start of a process is about what the shortest job takes."""
        updates = self._arguments.warmup + self._arguments.updates
        return LEAST_SECONDS + updates * statistics.median(row["seconds"])

    def _job(self, variant: str, layers: int, seconds: float, is_probe: bool) -> Job:
        names = ("tokens", "sequences", "recompute", "warmup", "updates", "smoke")
        given = {name: getattr(self._arguments, name) for name in names}
        if is_probe:
            given.update(warmup=_PROBE_WARMUP, updates=_PROBE_UPDATES)
        return Job(variant=variant, layers=layers, ends_at=time.time() + seconds, **given)


def compare_losses(row: Row, rows: Sequence[Row]) -> None:
    """Set the losses of an FP8 variant against those of bf16 with as many layers, update by update.

    Whether it follows is None where the updates that both have are too few to tell.
    """
    same = (r for r in rows if r["variant"] == "bf16" and r["layers"] == row["layers"] and r["seconds"])
    exact = next(same, None)
    if row["variant"] == "bf16" or not row["seconds"]:
        return
    if exact is None:
        row["loss"] = {"problem": f"bf16 has no losses at {row['layers']} layers"}
        return
    pairs = list(zip(row["losses"], exact["losses"], strict=False))
    differences = [found / wanted - 1 for found, wanted in pairs]
    worst = max(differences, key=abs)
    # A loss that is not a number is within no band.
    within = all(abs(difference) <= LOSS_BAND for difference in differences)
    row["loss"] = {
        "updates": len(pairs),
        "worst_relative_difference": worst,
        "mean_relative_difference": statistics.fmean(differences),
        "last": {"found": pairs[-1][0], "bf16": pairs[-1][1]},
        "band": LOSS_BAND,
        "follows_bf16": None if within and len(pairs) < LOSS_UPDATES else within,  # too few do not show that it does
    }


def layers_that_fit(arguments: argparse.Namespace, memory_bytes: float | None) -> int:
    """A first guess at the number of layers that the device's memory holds."""
    from megatron_klear.config import PRESETS
    from megatron_klear.observe.flops import projection_parameters

    arch = PRESETS["qwen3-tiny" if arguments.smoke else "qwen3-8b"]
    if memory_bytes is None:
        return min(arch.num_layers, 2)
    free = memory_bytes * 0.97 - 2e9
    free -= 2 * arch.vocab_size * arch.hidden_size * TRAINED_BYTES
    activations = ACTIVATIONS_BYTES[arguments.recompute] * arguments.tokens * arch.hidden_size
    per_layer = projection_parameters(arch) * TRAINED_BYTES + activations
    if arguments.recompute == "full":
        free -= ACTIVATIONS_BYTES["none"] * arguments.tokens * arch.hidden_size  # the layer that is computed again
    return max(1, min(arch.num_layers, int(free / per_layer)))


def rate(rows: Sequence[Row], about: Row, tokens: int) -> None:
    """Add rates to the rows that have figures."""
    for row in rows:
        if not row["seconds"]:
            continue
        seconds = statistics.median(row["seconds"])
        flops = sum(row["flops"].values()) / seconds / 1e12
        sheet = about["datasheet_bf16_tflops"]
        row.update(median_seconds=seconds, tokens_per_second=tokens / seconds, model_tflops=flops)
        row.update(mfu_measured=flops / about["measured_tflops"], mfu_datasheet=flops / sheet if sheet else None)


def aims(rows: Sequence[Row]) -> dict[str, Any]:
    """Whether the marks are reached, each with the variants that tell; None where too few updates or rows do.

    A rate is reached by the best row, and missed only when every row has all updates. Losses are within their band when
    every FP8 row was compared and follows bf16, and outside it when one does not.
    """
    bf16 = [row for row in rows if row["variant"] == "bf16"]
    fp8 = [row for row in rows if row["variant"] != "bf16"]
    rates = [{_named(row): _reaches(row, "mfu_datasheet", AIM_BF16_SHARE) for row in bf16}]
    rates += [{_named(row): _reaches(row, "model_tflops", AIM_FP8_TFLOPS) for row in fp8}]
    follows = {_named(row): row.get("loss", {}).get("follows_bf16") for row in fp8}
    return {
        f"bf16 at {AIM_BF16_SHARE:.0%} of the data sheet ({_covered(rates[0])})": _any(rates[0]),
        f"FP8 at {AIM_FP8_TFLOPS:.0f} model TFLOP/s ({_covered(rates[1])})": _any(rates[1]),
        f"FP8 losses within {LOSS_BAND:.0%} of bf16 over {LOSS_UPDATES} updates ({_covered(follows)})": _all(follows),
    }


def _named(row: Row) -> str:
    return f"{row['variant']}, {row['layers']} layers"


def _reaches(row: Row, figure: str, mark: float) -> bool | None:
    """Whether a row's rate reaches a mark; None when it has none, or one of a few updates only."""
    rate_of_row = row.get(figure)
    return None if rate_of_row is None or len(row["seconds"]) < LOSS_UPDATES else rate_of_row >= mark


def _covered(judged: dict[str, bool | None]) -> str:
    told = [name for name, reached in judged.items() if reached is not None]
    untold = [name for name, reached in judged.items() if reached is None]
    return "; ".join([*told, *(f"not told by {name}" for name in untold)]) or "no such variant"


def _any(judged: dict[str, bool | None]) -> bool | None:
    if any(judged.values()):
        return True
    return None if None in judged.values() or not judged else False


def _all(judged: dict[str, bool | None]) -> bool | None:
    if False in judged.values():
        return False
    return None if None in judged.values() or not judged else True


def print_table(rows: Sequence[Row], about: Row) -> None:
    """The figures for people."""
    sheet = about["datasheet_bf16_tflops"]
    known = "not known" if sheet is None else f"{sheet:.0f}"
    print(f"\n{about['device']}: products at {about['measured_tflops']:.4g} TFLOP/s measured, data sheet {known}")
    for attention in dict.fromkeys(row["attention"] for row in rows if row["seconds"]):
        print(f"attention: {attention}")
    heads = ("layers", "updates", "s/update", "tokens/s", "TFLOP/s", "MFU", "of sheet", "GiB", "loss off")
    print(f"{'variant':<24}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        if not row["seconds"]:
            print(f"{row['variant']:<24}{row['layers']:>10}  {row['problem']}")
            continue
        share = "" if row["mfu_datasheet"] is None else f"{row['mfu_datasheet']:.1%}"
        name = f"{row['variant']} ({row['dtype']})" if row["dtype"] != "bfloat16" else row["variant"]
        worst = row.get("loss", {}).get("worst_relative_difference")
        print(
            f"{name:<24}{row['layers']:>10}{len(row['seconds']):>10}{row['median_seconds']:>10.3f}"
            f"{row['tokens_per_second']:>10.0f}{row['model_tflops']:>10.4g}{row['mfu_measured']:>10.1%}{share:>10}"
            f"{row['peak_bytes'] / 2**30:>10.2f}{'' if worst is None else f'{worst:.2%}':>10}"
        )
        for attempt in row["attempts"]:
            print(f"{'':<24}{attempt['layers']:>10}  {attempt['problem']}")
        if "cut_short" in row:
            print(f"{'':<24}{'':>10}  ended early: {row['cut_short']}")
    for aim, reached in aims(rows).items():
        print(f"aim, {aim}: {'not told by this run' if reached is None else 'reached' if reached else 'MISSED'}")


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


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: 10)")
    parser.add_argument("--tokens", type=int, default=None, help="of an update (default: 32768; with --smoke 256)")
    parser.add_argument("--sequences", type=int, default=1, help="equal sequences that share them (default: 1)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=None, help="to begin with (default: as many as should fit)")
    parser.add_argument("--updates", type=int, default=LOSS_UPDATES, help=f"timed ones (default: {LOSS_UPDATES})")
    parser.add_argument("--warmup", type=int, default=3, help="untimed ones before (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; runs on a CPU too")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/train_8b_<device>.json")
    found = parser.parse_args(arguments)
    found.tokens = found.tokens or (256 if found.smoke else 32768)
    for name in ("tokens", "sequences", "updates"):
        if getattr(found, name) < 1:
            parser.error(f"--{name}: got {getattr(found, name)}, must be at least 1")
    if found.tokens // found.sequences < 2:
        parser.error(f"--sequences: got {found.sequences}, which leaves less than 2 of {found.tokens} tokens for each")
    return found


def main() -> int:
    """Run, print and write; returns the exit status."""
    arguments = parsed()
    began = time.time()
    status, about, log = run_child("device", 60.0 * arguments.minutes)
    if status != DONE or about is None:
        print(f"the device cannot be used:\n{log}", file=sys.stderr)
        return 1
    if about["memory_bytes"] is None and not arguments.smoke:
        print(
            "no GPU: an 8B-shaped model at this length is for one; --smoke shows that the script runs", file=sys.stderr
        )
        return 2
    arguments.minutes -= (time.time() - began) / 60.0
    short = re.sub(r"[^a-z0-9]+", "_", about["device"].lower().removeprefix("nvidia ")).strip("_")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"train_8b_{short}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record: Row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), **about, "versions": versions(),
        "smoke": arguments.smoke, "tokens": arguments.tokens, "sequences": arguments.sequences,
        "recompute": arguments.recompute,
    }  # fmt: skip

    def save(rows: list[Row]) -> None:
        rate(rows, about, arguments.tokens)
        fresh = out.with_suffix(".new")
        fresh.write_text(json.dumps({**record, "aims": aims(rows), "rows": rows}, indent=2) + "\n")
        fresh.replace(out)

    save([])
    rows = Plan(arguments, save=save).run_all(layers_that_fit(arguments, about["free_bytes"]))
    print_table(rows, about)
    print(f"written: {out}")
    return 0 if any(row["seconds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
