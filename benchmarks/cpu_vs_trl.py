"""Tokens per second of SFT, and seconds of an RL step, of this project against TRL on the same CPU cores.

    pip install -c constraints.txt -e .[benchmark]
    python benchmarks/cpu_vs_trl.py [--tasks sft rl] [--rounds 7] [--block 4] [--out FILE]

Both sides train the same small random Qwen3 (made here) on the same sequences in the same order, in float32 with
AdamW, clipping and no recomputation, with as many threads in all as `--cores`: this project as one data-parallel
gloo process per core, TRL as one process with all threads and as one process per core, padded and padding-free.
This project is compared with the best of TRL's ways. All are started before the first is timed, and then take turns
within a round, block by block, while the others wait, so that a busy machine slows all of them. The first step is
a warm-up; in SFT all losses of it must agree (in RL each side samples responses of its own).

An RL step is: 8 responses to each of 8 prompts, rewards, old logprobs, 4 optimizer updates of the clipped objective,
and the new weights in use for generation. Its tokens are those of the responses. Memory is the sum over a
contestant's processes of the largest resident set; at the start it is that of libraries, model and optimizer, of
which every process has its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpu_vs_trl_inputs import Workload, make_inputs

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("cpu_vs_trl_contestants.py")
LOSS_AGREEMENT = 1e-3
"""Largest relative difference between the losses of the first step; a benchmark of wrong numbers is worthless."""
AIM = 1.2
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "megatron-core", "numpy")


@dataclass(kw_only=True)
class Contestant:
    """One way to train: its processes, and how long its blocks of steps took."""

    name: str
    side: str
    processes: int
    threads: int
    options: dict[str, Any]
    wait_policy: str
    running: list[tuple[subprocess.Popen[bytes], int, int]] = field(default_factory=list)
    unread: dict[int, bytes] = field(default_factory=dict)
    blocks: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)

    def start(self, task: str, inputs: Path, seconds: float) -> None:
        """Start the processes and wait for their first step.

        Raises:
            SystemExit: they ended or took too long.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.processes):
            commands_read, commands_write = os.pipe()
            answers_read, answers_write = os.pipe()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                "MKL_NUM_THREADS": str(self.threads),
                # Threads that spin while they wait for one another lose much on a busy machine: TRL up to 5 times.
                "OMP_WAIT_POLICY": self.wait_policy,
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(WORKER.parent)]),
            }
            if self.processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                environment |= {"LOCAL_WORLD_SIZE": str(self.processes)}
            options = json.dumps({"threads": self.threads, **self.options})
            log = (inputs / f"{self.name.replace(' ', '_')}_{rank}.log").open("w")
            process = subprocess.Popen(
                [sys.executable, WORKER, self.side, task, inputs, options, str(commands_read), str(answers_write)],
                env=environment,
                pass_fds=(commands_read, answers_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            os.close(commands_read)
            os.close(answers_write)
            self.running.append((process, commands_write, answers_read))
        self.first = self._answers(seconds, inputs)

    def run(self, steps: int, seconds: float, inputs: Path) -> None:
        """Do a block of steps and note what it took."""
        for _, commands, _ in self.running:
            os.write(commands, f"{steps}\n".encode())
        self.blocks.append({**self._answers(seconds, inputs), "steps": steps})

    def _answers(self, seconds: float, inputs: Path) -> dict[str, float]:
        answers = []
        for rank, (_, _, readable) in enumerate(self.running):
            text = b""
            while not text.endswith(b"\n"):
                found = os.read(readable, 65536) if select.select([readable], [], [], seconds)[0] else b""
                if not found:
                    log = (inputs / f"{self.name.replace(' ', '_')}_{rank}.log").read_text()[-3000:]
                    raise SystemExit(f"{self.name}: process {rank} gave no answer\n{log}")
                text += found
            answers.append(json.loads(text))
        merged = dict(answers[0])
        merged["seconds"] = max(a["seconds"] for a in answers)
        for summed in ("processor_seconds", "ready_rss_mib", "peak_rss_mib", "tokens"):
            merged[summed] = sum(a[summed] for a in answers)
        merged["loss"] = statistics.fmean(a.get("loss", 0.0) for a in answers)
        return merged

    def stop(self) -> None:
        """End the processes."""
        for process, commands, answers in self.running:
            os.close(commands)
            os.close(answers)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running = []

    def median(self, what: str) -> float:
        """Median over blocks of seconds per step, or tokens per second."""
        if what == "seconds":
            return statistics.median(b["seconds"] / b["steps"] for b in self.blocks)
        return statistics.median(b["tokens"] / b["seconds"] for b in self.blocks)


def contestants(task: str, cores: int, wait_policy: str) -> list[Contestant]:
    """This project first, then TRL's ways."""
    shared: dict[str, Any] = {"wait_policy": wait_policy}
    ours = Contestant(name="ours", side="ours", processes=cores, threads=1, options={"token_budget": 2048}, **shared)
    found = [ours]
    ways: list[tuple[str, int, dict[str, Any]]]
    if task == "sft":
        ways = [
            ("trl padded", 1, {"batch": 4, "padding_free": False}),
            ("trl padded", cores, {"batch": 4, "padding_free": False}),
            ("trl padding-free", 1, {"batch": 4, "padding_free": True}),
            ("trl padding-free", cores, {"batch": 4, "padding_free": True}),
        ]
    else:
        ways = [("trl", 1, {"batch": 16}), ("trl", cores, {"batch": 16})]
    for name, n, options in ways:
        theirs = {"name": f"{name} {n}x{cores // n}", "processes": n, "threads": cores // n, "options": options}
        found.append(Contestant(side="trl", **theirs, **shared))
    return found


def compare(task: str, arguments: argparse.Namespace, inputs: Path) -> list[Contestant]:
    """Start all contestants, check that SFT's first losses agree, and let them take turns."""
    chosen = contestants(task, arguments.cores, arguments.wait_policy)
    try:
        for one in chosen:
            print(f"{task}: starting {one.name}", file=sys.stderr, flush=True)
            one.start(task, inputs, arguments.timeout)
            loss, expected = one.first["loss"], chosen[0].first["loss"]
            if task == "sft" and abs(loss - expected) > LOSS_AGREEMENT * abs(expected):
                raise SystemExit(f"{task}: the losses of the first step disagree, {expected} and {loss} ({one.name})")
        for number in range(arguments.rounds):
            # Who comes first changes, so that nobody always follows the same.
            for one in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                one.run(arguments.block if task == "sft" else 1, arguments.timeout, inputs)
            speeds = ", ".join(f"{c.name} {c.blocks[-1]['seconds'] / c.blocks[-1]['steps']:.2f}" for c in chosen)
            print(f"{task}: round {number + 1}/{arguments.rounds}, seconds per step: {speeds}", file=sys.stderr)
    finally:
        for one in chosen:
            one.stop()
    return chosen


def summary(task: str, chosen: list[Contestant]) -> dict[str, Any]:
    """Medians of all contestants, and ratios of this project to the best of TRL's ways in each round."""
    ours, others = chosen[0], chosen[1:]
    best = max(others, key=lambda c: c.median("tokens"))  # by what is claimed
    rates = [
        (a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"])
        for a, b in zip(ours.blocks, best.blocks, strict=True)
    ]
    rows = [
        {
            "name": c.name,
            "processes": c.processes,
            "threads": c.threads,
            "options": c.options,
            "seconds_per_step": c.median("seconds"),
            "tokens_per_second": c.median("tokens"),
            "processor_seconds_per_step": statistics.median(b["processor_seconds"] / b["steps"] for b in c.blocks),
            "ready_rss_mib": c.first["ready_rss_mib"],
            "peak_rss_mib": max(b["peak_rss_mib"] for b in c.blocks),
            "blocks": c.blocks,
        }
        for c in chosen
    ]
    return {
        "task": task,
        "rows": rows,
        "best_of_trl": best.name,
        "tokens_per_second_ratio": statistics.median(rates),
        "tokens_per_second_ratios": rates,
        "seconds_per_step_ratio": best.median("seconds") / ours.median("seconds"),
    }


def print_table(result: dict[str, Any]) -> None:
    """Print one line per contestant, and the ratio that counts."""
    step = "optimizer update" if result["task"] == "sft" else "rollout batch with its updates"
    print(f"\n{result['task']}: medians over {len(result['rows'][0]['blocks'])} blocks; a step is one {step}")
    heads = f"{'tokens/s':>10}{'s/step':>9}{'processor s/step':>18}{'peak RSS MiB':>14}{'at start':>10}{'speed':>8}"
    print(f"{'processes x threads':<24}{heads}")
    ours = result["rows"][0]
    for row in result["rows"]:
        name = f"ours {row['processes']}x{row['threads']}" if row is ours else row["name"]
        speed = row["tokens_per_second"] / ours["tokens_per_second"]
        print(
            f"{name:<24}{row['tokens_per_second']:>10.0f}{row['seconds_per_step']:>9.2f}"
            f"{row['processor_seconds_per_step']:>18.2f}{row['peak_rss_mib']:>14.0f}{row['ready_rss_mib']:>10.0f}{speed:>7.2f}x"
        )
    ratios = result["tokens_per_second_ratios"]
    verdict = "reached" if result["tokens_per_second_ratio"] >= AIM else "not reached"
    print(
        f"ours against {result['best_of_trl']}: {result['tokens_per_second_ratio']:.2f} times its tokens/s (rounds: "
        f"{min(ratios):.2f} to {max(ratios):.2f}), {result['seconds_per_step_ratio']:.2f} times its steps; "
        f"the aim of {AIM} is {verdict}"
    )


def provenance(arguments: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": git("status", "--porcelain") != "",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cores": arguments.cores,
        "omp_wait_policy": arguments.wait_policy,
        "load_average_before": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "sft_steps_per_block": arguments.block,
        "dtype": "float32",
        "workload": asdict(work),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=("sft", "rl"), default=["sft", "rl"])
    parser.add_argument("--rounds", type=int, default=7, help="blocks of every contestant (default: %(default)s)")
    parser.add_argument("--block", type=int, default=4, help="SFT steps of a block; RL: 1 (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=2, help="threads that each side may use (default: %(default)s)")
    parser.add_argument("--wait-policy", choices=("PASSIVE", "ACTIVE"), default="PASSIVE", help="of OpenMP's threads")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a block may take at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_vs_trl.json")
    arguments = parser.parse_args()
    missing = [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed; run: pip install -c constraints.txt -e .[benchmark]")
    # As Ctrl-C does it: the contestants are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work, results = Workload(), []
    provided = provenance(arguments, work)
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory), work)
        for task in arguments.tasks:
            results.append(summary(task, compare(task, arguments, Path(directory))))
    for result in results:
        print_table(result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**provided, "results": results}, indent=2) + "\n")
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
