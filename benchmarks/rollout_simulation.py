"""The real rollout manager and ledger over simulated engines: overhead, memory, and how long engines stand idle.

    python benchmarks/rollout_simulation.py [--engines 1000] [--slots 100] [--steps 6] [--out FILE]

Engines only count: a response takes the time of its tokens, in simulated seconds, and its tokens are random numbers.
Everything between them and the trainer is real: scheduling, balancing, checks of answers, the SQLite file. The
lengths of responses are log-normal. Three placements do the same work: as many steps, prompts and engines; a step has
as many responses as the engines have slots.

- sync: a step is generated, then trained; engines stand idle meanwhile, and while the longest response is finished.
- one_step_off: the next step is generated while one is trained; a publish waits for it.
- async: engines are refilled at once; a publish interrupts responses, which go on under the new weights.

With the defaults 100,000 requests are in flight. Memory is noted after every step: it is that of what is in flight and
not trained, however much was trained before.

Overhead is the processor time of the whole process, engines included, per request: an upper bound on that of manager
and ledger; requests of HTTP clients are not made. The ledger syncs to the disk; a commit is taken to last 20 simulated
ms, in which others gather. Idle is one minus the share of slots in use (of engines with any in use), over the time from
the first request to the end of training. Simulated time stands still while the processor works: `cpu_per_second` says
how much of one core a second of such a run takes, and above 1 that one core could not keep up with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_klear.config import SchedulingSettings
from megatron_klear.records import Grade, Prompt, RolloutGroup
from megatron_klear.rollout.endpoint import GenerationRequest
from megatron_klear.rollout.engine import SamplingParams
from megatron_klear.rollout.ledger import Ledger, LedgerReader
from megatron_klear.rollout.manager import Sampling, Scheduler
from megatron_klear.rollout.simulation import SimulatedEngine, run_simulated
from megatron_klear.rollout.simulation.clock import run_inline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.origin import origin

MODES = ("sync", "one_step_off", "async")
BUDGET, PROMPT_TOKENS = 4096, 64
MEDIAN_TOKENS, SIGMA = 400.0, 0.9
SECONDS_PER_TOKEN = 0.02
TRAIN_SECONDS, PUBLISH_SECONDS = 10.0, 1.0
COMMIT_SECONDS = 0.02
SAMPLE_SECONDS = 1.0
STALENESS = 4
RESPONSES = 8


@dataclass(frozen=True, kw_only=True)
class Result:
    """One placement; times in simulated seconds unless they are named CPU seconds."""

    mode: str
    engines: int
    most_in_flight: int
    steps: int
    requests: int
    responses_trained: int
    tokens_generated: int
    interrupted: int
    simulated_seconds: float
    slots_idle: float
    engines_idle: float
    cpu_seconds: float
    cpu_ms_per_request: float
    cpu_per_second: float
    ledger_cpu_seconds: float
    peak_mib: float
    resident_mib: tuple[float, ...]
    start_mib: float
    ledger_mib: float
    trained_not_once: int
    busy: tuple[float, ...]


def total_tokens(request: GenerationRequest) -> int:
    """Length of a whole response: log-normal, a function of its group and index, which the request's name holds."""
    _, group, index, _ = request.request_id.split("-")
    normal = np.random.Generator(np.random.SFC64([int(group), int(index)])).standard_normal()
    return int(np.clip(MEDIAN_TOKENS * np.exp(SIGMA * normal), 1, BUDGET))


def remaining(request: GenerationRequest) -> int:
    """Tokens left of a response."""
    return max(1, total_tokens(request) - (len(request.token_ids) - PROMPT_TOKENS))


def grade(groups: Sequence[RolloutGroup]) -> list[list[Grade]]:
    """Grading is not what is measured."""
    return [[Grade(outcome="correct", reward=1.0)] * len(group.rollouts) for group in groups]


class Meter:
    """Adds up the processor time of the ledger's transactions and reads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def run(self, function, *arguments):  # type: ignore[no-untyped-def]
        await asyncio.sleep(COMMIT_SECONDS)
        began = time.process_time()
        try:
            return await run_inline(function, *arguments)
        finally:
            self.seconds += time.process_time() - began


def prompts(first: int, count: int) -> list[tuple[int, Prompt]]:
    return [
        (0, Prompt(prompt_id=f"p{i}", domain="math", reference="1", token_ids=np.full(PROMPT_TOKENS, i % 1000)))
        for i in range(first, first + count)
    ]


async def train(
    mode: str, ledger: Ledger, engines: list[SimulatedEngine], slots: int, groups: int, steps: int, meter: Meter
) -> tuple[Scheduler, list[float], list[float], int, list[float]]:
    """A trainer that takes its time.

    Returns:
        shares of busy slots and of busy engines, most requests in flight, and MiB of memory after every step.
    """
    params = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=BUDGET, stop_token_ids=(7,))
    scheduler = Scheduler(
        engines,
        ledger,
        settings=SchedulingSettings(
            mode=mode, max_staleness=STALENESS, order="completion" if mode == "async" else "fixed", in_flight=slots,
            stall_seconds=120.0,
        ),
        sampling=Sampling(params=params, num_responses=RESPONSES, seed=1, vocab_size=1000),
        groups_per_step=groups,
        grade=grade,
        run_blocking=meter.run,
    )  # fmt: skip
    busy_slots: list[float] = []
    busy_engines: list[float] = []
    resident: list[float] = []
    most = 0

    async def sample() -> None:
        nonlocal most
        while True:
            running = np.array([engine.running for engine in engines])
            busy_slots.append(float(running.sum() / (slots * len(engines))))
            busy_engines.append(float((running > 0).mean()))
            most = max(most, scheduler.dispatcher.num_flying)
            await asyncio.sleep(SAMPLE_SECONDS)

    await scheduler.start(version=0, next_step=1)
    await scheduler.resume(0)
    sampler = asyncio.create_task(sample())
    submitted = 0
    for step in range(1, steps + 1):
        while submitted < (step + scheduler.staleness) * groups:
            scheduler.add(ledger.reserve(prompts(submitted, groups), num_responses=RESPONSES))
            submitted += groups
        taken = await scheduler.take(step, groups)
        assert taken is not None
        assert len(taken) == groups
        assert all(step - 1 - (g.oldest_version or 0) <= scheduler.staleness for g in taken)
        del taken
        await asyncio.sleep(TRAIN_SECONDS)
        ledger.trained(step)
        ledger.prune(step)
        scheduler.trained(step)
        await scheduler.pause()
        await asyncio.sleep(PUBLISH_SECONDS)
        for engine in engines:
            engine.version = step
        resident.append(psutil.Process().memory_info().rss / 2**20)
        if step < steps:
            await scheduler.resume(step)
    sampler.cancel()
    await scheduler.close()
    return scheduler, busy_slots, busy_engines, most, resident


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mode: str, num_engines: int, slots: int, steps: int) -> Result:
    """One placement, in this process."""
    groups = num_engines * slots // RESPONSES
    start, meter = peak_mib(), Meter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.sqlite"
        ledger = Ledger(file)
        engines = [
            SimulatedEngine(f"engine {i}", remaining=remaining, slots=slots, seconds_per_token=SECONDS_PER_TOKEN,
                            report_seconds=10.0)
            for i in range(num_engines)
        ]  # fmt: skip
        for engine in engines:
            engine.requests_seen = deque(maxlen=0)  # else the stand-ins would remember every request
        began = time.process_time()
        scheduler, busy_slots, busy_engines, most, resident = run_simulated(
            train(mode, ledger, engines, slots, groups, steps, meter)
        )
        cpu = time.process_time() - began
        ledger.close()
        with LedgerReader(file) as reader:
            wrong = len(reader.trained_not_once())
            trained = reader.states()["trained"] * RESPONSES
        size = file.stat().st_size / 2**20
    counts = scheduler.dispatcher.counts
    return Result(
        mode=mode,
        engines=num_engines,
        most_in_flight=most,
        steps=steps,
        requests=counts["requests"],
        responses_trained=trained,
        tokens_generated=counts["tokens"],
        interrupted=counts["interrupted"],
        simulated_seconds=len(busy_slots) * SAMPLE_SECONDS,
        slots_idle=1 - float(np.mean(busy_slots)),
        engines_idle=1 - float(np.mean(busy_engines)),
        cpu_seconds=cpu,
        cpu_ms_per_request=1000 * cpu / counts["requests"],
        cpu_per_second=cpu / (len(busy_slots) * SAMPLE_SECONDS),
        ledger_cpu_seconds=meter.seconds,
        peak_mib=peak_mib(),
        resident_mib=tuple(round(x, 1) for x in resident),
        start_mib=start,
        ledger_mib=size,
        trained_not_once=wrong,
        busy=tuple(round(x, 4) for x in busy_slots),
    )


def draw(results: Sequence[Result], file: Path) -> None:
    """Shares of busy slots over time, one panel per placement on one time axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "sync": "synchronous",
        "one_step_off": "one step off",
        "async": f"asynchronous, staleness up to {STALENESS}",
    }
    figure, axes = pyplot.subplots(len(results), 1, figsize=(9, 1.9 * len(results) + 0.9), sharex=True, sharey=True)
    for axis, result in zip(np.atleast_1d(axes), results, strict=True):
        seconds = np.arange(len(result.busy)) * SAMPLE_SECONDS
        axis.fill_between(seconds, 100 * np.array(result.busy), color="#2a6fb0", linewidth=0, step="post")
        axis.axvline(result.simulated_seconds, color="#444444", linewidth=1)
        axis.set_title(
            f"{titles[result.mode]}: engines idle {100 * result.engines_idle:.0f} %, their slots "
            f"{100 * result.slots_idle:.0f} %; {result.steps} steps in {result.simulated_seconds:.0f} s",
            loc="left", fontsize=10,
        )  # fmt: skip
        axis.set_ylim(0, 105)
        axis.set_ylabel("slots busy, %")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    last = np.atleast_1d(axes)[-1]
    last.set_xlim(0, 1.02 * max(r.simulated_seconds for r in results))
    last.set_xlabel("simulated seconds; the line marks the end of training")
    first = results[0]
    figure.suptitle(
        f"{first.engines:,} simulated engines, up to {max(r.most_in_flight for r in results):,} requests in flight",
        x=0.01, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=100, help="requests in flight on one engine")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout_simulation"))
    parser.add_argument("--mode", choices=MODES, help="one placement only, its result printed as JSON")
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(asdict(measure(options.mode, options.engines, options.slots, options.steps))))
        return
    results, told = [], origin()
    for mode in MODES:  # each in a process of its own: peak memory never goes down
        command = [sys.executable, __file__, "--mode", mode, "--engines", str(options.engines), "--slots",
                   str(options.slots), "--steps", str(options.steps)]  # fmt: skip
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = Result(**json.loads(output))
        results.append(result)
        ledger_share = result.ledger_cpu_seconds / result.cpu_seconds
        print(
            f"{mode:13} {result.requests:,} requests, at most {result.most_in_flight:,} in flight; "
            f"{result.cpu_ms_per_request:.3f} ms of CPU per request ({ledger_share:.0%} in the ledger), "
            f"{result.cpu_per_second:.2f} s of it per simulated second; "
            f"peak {result.peak_mib:.0f} MiB, after each step "
            f"{', '.join(f'{mib:.0f}' for mib in result.resident_mib)}; slots idle {result.slots_idle:.0%}, "
            f"engines idle {result.engines_idle:.0%}; {result.steps} steps in {result.simulated_seconds:.0f} "
            "simulated s",
            flush=True,
        )
    report = {
        **told,
        "python": platform.python_version(),
        "lengths": {"median": MEDIAN_TOKENS, "sigma": SIGMA, "limit": BUDGET},
        "seconds": {"token": SECONDS_PER_TOKEN, "train": TRAIN_SECONDS, "publish": PUBLISH_SECONDS},
        "results": [asdict(result) for result in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, options.out.with_suffix(".png"))
    print(f"written: {options.out}.json, {options.out}.png")


if __name__ == "__main__":
    main()
