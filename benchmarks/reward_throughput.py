"""How fast rewards are computed: 1,024 responses with 16 tests each, by workers, and the design against others.

Responses answer 64 problems of reasoning-gym's CodeI/O data (examples/codeio_problems.py), 16 each, as groups do: most
programs are right, some fail some tests, some fail all, some do not compile. Math answers are graded beside.

    python benchmarks/reward_throughput.py [--workers 1,2,4] [--responses 1024]

Prints tables, writes benchmarks/results/reward_throughput.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from megatron_klear.reward import CodeGraderPool, GradeRequest, Limits, MathGraderPool, count_outcomes
from megatron_klear.reward.sandbox import SandboxProcess
from megatron_klear.reward.sandbox.view import bubblewrap_command, find_interpreter

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from codeio_problems import TESTS, collect

RESULTS = Path(__file__).parent / "results"
PYTHON = "/usr/bin/python3"
LIMIT_SECONDS = 120.0

# What becomes of a right program, in turn; %d makes every response a program of its own.
KINDS = (
    "{code}\n# %d",
    "{code}\n# %d",
    "{code}\n# %d",
    "{code}\n_all = main_solution\ndef main_solution(**k):\n    return _all(**k) if len(str(k)) %% 2 else None\n# %d",
    "def main_solution(**k):\n    return None\n# %d",
    "def main_solution(**k:\n# %d",
)


def code_requests(count: int) -> list[GradeRequest]:
    """`count` responses to 64 problems."""
    problems, _ = collect(64)
    requests = []
    for number in range(count):
        problem = problems[number * len(problems) // count]["reference"]
        code = KINDS[number % len(KINDS)].replace("{code}", problem["solution"].replace("%", "%%")) % number
        response = f"<think>t</think>\n```python\n{code}\n```"
        requests.append(GradeRequest(str(number), response, json.dumps(problem)))
    return requests


def math_requests(count: int) -> list[GradeRequest]:
    """`count` different math answers, half of them right."""
    return [
        GradeRequest(str(i), rf"<think>t</think>\boxed{{\frac{{{i}}}{{{2 * i + 1}}}}}", f"{i + i % 2}/{2 * i + 1}")
        for i in range(1, count + 1)
    ]


def measured(make: Callable[[], Any], requests: list[GradeRequest]) -> dict[str, Any]:
    """Seconds for all requests, by the clock and of CPU, workers being started, and the outcomes."""
    with make() as pool:
        pool.grade_many(requests[:1])
        before, began = cpu_seconds(pool), time.perf_counter()
        grades = pool.grade_many(requests)
        seconds, cpu = time.perf_counter() - began, cpu_seconds(pool) - before
    counts = count_outcomes(grades)
    ungraded = [grade.reason for grade in grades if grade.outcome == "ungraded"]
    assert len(ungraded) <= len(grades) // 100, ungraded[0]  # a busy machine may cost a math answer its time
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "outcomes": counts}


def cpu_seconds(pool: Any) -> float:
    """CPU time so far of this process and of all that its workers have run and reaped."""
    own = os.times()
    workers = [psutil.Process(pid) for pid in pool.worker_pids()]
    processes = [p for worker in workers for p in [worker, *worker.children(recursive=True)]]
    times = [p.cpu_times() for p in processes]
    return own.user + own.system + sum(t.user + t.system + t.children_user + t.children_system for t in times)


def per_test(run: Callable[[], None], count: int) -> dict[str, float]:
    """Milliseconds of one run, by the clock."""
    run()
    began = time.perf_counter()
    for _ in range(count):
        run()
    return {"wall_ms": round((time.perf_counter() - began) / count * 1e3, 2)}


def designs(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds per test of ways to run a trivial program, one after the other; start-up spread over 16 tests."""
    interpreter = find_interpreter(PYTHON)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": True}
    python = [PYTHON, "-S", "-s", "-c", "print(1)"]
    bubblewrap = [*bubblewrap_command(interpreter, ()), interpreter.executable, *python[1:]]
    test = {"kind": "stdin", "input": ""}

    def answer(sandbox: SandboxProcess) -> None:
        sandbox.open({"answer": "print(1)"}, Limits())
        for _ in range(TESTS):
            sandbox.run(test)
        sandbox.close_answer()

    def one_sandbox_per_answer() -> None:
        sandbox = SandboxProcess(python=PYTHON)
        sandbox.wait_ready()
        answer(sandbox)
        sandbox.discard()

    found = {
        "an interpreter per test, no sandbox": per_test(lambda: subprocess.run(python, **quiet), repeats),
        "bubblewrap and an interpreter per test": per_test(lambda: subprocess.run(bubblewrap, **quiet), repeats),
        "bubblewrap per answer, a fork per test": _shared_by(TESTS, per_test(one_sandbox_per_answer, repeats // 8)),
    }
    sandbox = SandboxProcess(python=PYTHON)
    sandbox.wait_ready()
    kept = per_test(lambda: answer(sandbox), repeats // 4)
    sandbox.discard()
    found["bubblewrap per worker, namespaces per answer, a fork per test"] = _shared_by(TESTS, kept)
    return found


def _shared_by(count: int, times: dict[str, float]) -> dict[str, float]:
    return {name: round(value / count, 2) for name, value in times.items()}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(
        title=f"{result['responses']} responses x {TESTS} tests, {result['cores']} cores", title_justify="left"
    )
    for heading in ("workers", "code, s", "CPU s", "tests/s", "math, s", "CPU s", "answers/s"):
        table.add_column(heading, justify="right")
    for workers, row in result["by_workers"].items():
        count, code, math = result["responses"], row["code"], row["math"]
        cells = [f"{code['seconds']:.1f}", f"{code['cpu_seconds']:.1f}", f"{count * TESTS / code['seconds']:.0f}"]
        cells += [f"{math['seconds']:.2f}", f"{math['cpu_seconds']:.2f}", f"{count / math['seconds']:.0f}"]
        table.add_row(workers, *cells)
    console.print(table)
    table = Table(title="A trivial test, one after the other", title_justify="left")
    for heading in ("design", "wall, ms a test"):
        table.add_column(heading, justify="right" if "ms" in heading else "left")
    for name, times in result["designs"].items():
        table.add_row(name, f"{times['wall_ms']:.1f}")
    console.print(table)


def plot(result: dict[str, Any], file: Path) -> None:
    """The curve by workers."""
    workers = [int(name) for name in result["by_workers"]]
    seconds = [row["code"]["seconds"] for row in result["by_workers"].values()]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    busy = [row["code"]["cpu_seconds"] / result["cores"] for row in result["by_workers"].values()]
    axes.plot(workers, seconds, marker="o", label=f"by the clock (load average {result['load_average_before']:.0f})")
    axes.plot(workers, busy, marker="s", linestyle=":", label="CPU time over the cores")
    axes.axhline(LIMIT_SECONDS, color="gray", linestyle="--", label=f"limit, {LIMIT_SECONDS:.0f} s")
    for x, y in zip(workers, seconds, strict=True):
        axes.annotate(f"{y:.0f} s", (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="workers", ylabel="seconds", ylim=(0, max(LIMIT_SECONDS, *seconds) * 1.15), xticks=workers)
    axes.set_title(
        f"{result['responses']:,} responses x {TESTS} tests on {result['cores']} cores", loc="left", fontsize=10
    )
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1.0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main() -> int:
    """Measure, print, write; exit status 1 if the best number of workers is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,3,4", help="numbers of workers (default: 1,2,3,4)")
    parser.add_argument("--responses", type=int, default=1024, help="responses (default: 1024)")
    parser.add_argument("--repeats", type=int, default=64, help="runs of each design (default: 64)")
    given = parser.parse_args()
    code, math = code_requests(given.responses), math_requests(given.responses)
    result: dict[str, Any] = {
        "responses": given.responses,
        "tests": TESTS,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 1),
        "by_workers": {},
    }
    for workers in [int(word) for word in given.workers.split(",")]:
        result["by_workers"][str(workers)] = {
            "code": measured(lambda n=workers: CodeGraderPool(workers=n, python=PYTHON), code),  # type: ignore[misc]
            "math": measured(lambda n=workers: MathGraderPool(workers=n), math),  # type: ignore[misc]
        }
    result["designs"] = designs(given.repeats)
    result["load_average_after"] = round(os.getloadavg()[0], 1)
    show(result, Console(width=120))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reward_throughput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, RESULTS / "reward_throughput.png")
    best = min(row["code"]["seconds"] for row in result["by_workers"].values())
    print(f"fastest: {best:.1f} s, limit {LIMIT_SECONDS:.0f} s; load average {result['load_average_before']} before")
    return 0 if best < LIMIT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
