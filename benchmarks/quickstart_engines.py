"""The quickstart's RL step with the engine inside the trainer and with SGLang's servers, side by side.

    python benchmarks/quickstart_engines.py --work DIR [--rounds 3] [--steps 6] [--venv .venv-sglang]

`DIR` is that of a quickstart whose fine-tuning is done (`bash examples/quickstart.sh 1 DIR`). Each round has one run of
every contestant, one after the other, each from the same fine-tuned weights with the same seed, two ranks, some steps.
A run's first step is left out: it warms up. Seconds are those of the step's phases; core seconds are what all processes
of the run, servers and graders included, took of the processor, which tells more where the machine has other work too.

Prints a table and writes benchmarks/results/quickstart_engines.json, rounds of earlier calls included with --add.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.origin import origin  # noqa: E402

RESULT = Path(__file__).with_name("results") / "quickstart_engines.json"
CONTESTANTS: dict[str, list[str]] = {
    "local": [],
    "sglang": ["rollout.engine=sglang"],
    "sglang x 2": ["rollout.engine=sglang", "sglang.servers=2"],
}
PHASES = ("generate", "old logprobs", "train", "publish")


class Run:
    """One run of train_rl in two processes, watched by the processor time that it takes.

    Args:
        work: the quickstart's directory.
        overrides: of the contestant.
        steps: to run.
    """

    def __init__(self, work: Path, overrides: list[str], steps: int) -> None:
        self._directory = work / "benchmark"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._metrics = self._directory / "metrics.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._log = work / "benchmark.log"
        command = [
            sys.executable, "-m", "megatron_klear.train_rl", "examples/quickstart_rl.yaml",
            f"run.dir={self._directory}",
            f"data.prompts=[{work / 'data' / 'prompts.jsonl'}]", "data.heldout=[]", f"rl.steps={steps}",
            f"tokenizer.dir={work / 'data' / 'tokenizer'}", f"checkpoint.start_from={work / 'sft'}",
            "checkpoint.every_steps=0", "evaluation.at_end=false", "observe.report=false", *overrides,
        ]  # fmt: skip
        self._ranks = []
        with self._log.open("wb") as log:
            for rank in range(2):
                environment = {
                    **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                }  # fmt: skip
                self._ranks.append(
                    psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def rows(self) -> list[dict[str, Any]]:
        """Wait for the end; what was logged of each step, with the core seconds since the step before."""
        core_seconds: list[float] = []
        while any(rank.poll() is None for rank in self._ranks):
            if len(self._logged()) > len(core_seconds):
                core_seconds.append(self._core_seconds())
            time.sleep(0.02)
        rows = self._logged()
        if any(rank.returncode for rank in self._ranks):
            raise RuntimeError(f"the run failed:\n{self._log.read_text(errors='replace')[-4000:]}")
        for number, row in enumerate(rows):
            is_known = 0 < number < len(core_seconds)
            row["core seconds"] = core_seconds[number] - core_seconds[number - 1] if is_known else None
        return rows[1:]

    def _logged(self) -> list[dict[str, Any]]:
        try:
            rows = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        except (OSError, ValueError):
            return []
        return [row for row in rows if row["phase"] == "rl"]

    def _core_seconds(self) -> float:
        total = 0.0
        for rank in self._ranks:
            for process in [rank, *rank.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    total += times.user + times.system
                except psutil.Error:
                    continue
        return total


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over steps."""
    named = {name: statistics.fmean(row[f"phase_seconds/{name}"] for row in rows) for name in PHASES}
    core = [row["core seconds"] for row in rows if row["core seconds"] is not None]
    return {
        "step": statistics.fmean(sum(v for k, v in row.items() if k.startswith("phase_seconds/")) for row in rows),
        **named,
        "core seconds": statistics.fmean(core) if core else float("nan"),
        "tokens per response": statistics.fmean(row["response/length_mean"] for row in rows),
    }


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Medians over rounds, and how much slower each contestant was than the first in the same round."""
    lines = [
        f"{'engine':20} {'s/step':>8} " + " ".join(f"{name:>12}" for name in PHASES) + f" {'core s':>8}  times local"
    ]
    for name in CONTESTANTS:
        found = [entry for entry in rounds if name in entry]
        if not found:
            continue
        middle = {key: statistics.median(entry[name][key] for entry in found) for key in found[0][name]}
        ratios = [entry[name]["step"] / entry["local"]["step"] for entry in found if "local" in entry]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        phases = " ".join(f"{middle[phase]:12.2f}" for phase in PHASES)
        lines.append(f"{name:20} {middle['step']:8.2f} {phases} {middle['core seconds']:8.2f}  {spread}")
    return "\n".join(lines)


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--venv", default=".venv-sglang")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="names of contestants, separated by commas")
    parser.add_argument("--add", action="store_true", help="to the rounds of the result that is there")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    told = origin(Path(arguments.venv))
    if arguments.add and arguments.out.is_file():
        rounds = json.loads(arguments.out.read_text())["rounds"]
    chosen = [name for name in CONTESTANTS if name in arguments.only.split(",")]
    for _ in range(arguments.rounds):
        entry: dict[str, dict[str, float]] = {}
        rounds.append(entry)
        for name in chosen:
            run = Run(arguments.work, [*CONTESTANTS[name], f"sglang.venv={arguments.venv}"], arguments.steps)
            entry[name] = summary(run.rows())
            entry[name]["load average"] = os.getloadavg()[0]
            print(f"{name}: {entry[name]}", flush=True)
            result = {**told, "steps": arguments.steps - 1, "rounds": rounds}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rounds))


if __name__ == "__main__":
    main()
