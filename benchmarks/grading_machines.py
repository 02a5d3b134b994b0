"""What it costs to have another machine's workers grade: the way there and back, beside the grading itself.

    python benchmarks/grading_machines.py [--responses 1024] [--characters 100000] [--seconds 1.0]

Two processes play two machines. Responses go to both in pieces, as they do in a run; a grader here does nothing but
wait `--seconds` per response in one of `--workers` threads, so that what is left over is ours. Prints it, and writes
benchmarks/results/grading_machines.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron_klear.parallel import Machines
from megatron_klear.records import Grade
from megatron_klear.session.machine_graders import MachineGraders

RESULT = Path(__file__).with_name("results") / "grading_machines.json"


class Waiting:
    """Grades by waiting.

    Args:
        workers: responses at a time.
        seconds: for each.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        self._threads, self._seconds = ThreadPoolExecutor(workers), seconds

    def grade_many(self, requests: Sequence[Any]) -> list[Grade]:
        """All correct."""
        if self._seconds:
            list(self._threads.map(lambda _: time.sleep(self._seconds), requests))
        return [Grade(outcome="correct", reward=1.0, reason="") for _ in requests]

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def play(rank: int, port: int, arguments: argparse.Namespace, answers: Any) -> None:
    """Be one machine; the first times the grading."""
    os.environ.update(LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    context: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, size=2))
    machines = Machines(context)
    pool = Waiting(arguments.workers, arguments.seconds)
    graders = MachineGraders(machines, pool, workers=arguments.workers)
    dist.barrier()
    if rank == 0:
        requests = [(str(i), f"{i:x>{arguments.characters}}", "1") for i in range(arguments.responses)]
        began, used = time.perf_counter(), time.process_time()
        graders.grade_many(requests)
        both = time.perf_counter() - began, time.process_time() - used
        began = time.perf_counter()
        pool.grade_many(requests)
        answers.put((*both, time.perf_counter() - began))
    dist.barrier()
    machines.close()
    graders.close()
    dist.destroy_process_group()


def main() -> None:
    """Start both, print what the first measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--characters", type=int, default=100_000, help="of a response; about 32K tokens")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a response takes a worker")
    parser.add_argument("--workers", type=int, default=32, help="on each machine")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=play, args=(rank, port, arguments, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    seconds, core_seconds, alone = answers.get()
    for process in processes:
        process.join()
    result = {
        **vars(arguments),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "two machines, seconds": seconds,
        "two machines, core seconds of the first rank per response": core_seconds / arguments.responses,
        "one machine, seconds": alone,
    }
    for name, value in result.items():
        print(f"{name:60} {value}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
