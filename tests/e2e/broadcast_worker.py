"""train_rl whose servers fail in the middle of a set of weights: one is killed, later the other one is stopped.

python broadcast_worker.py CONFIG.yaml [section.field=value ...]
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from megatron_klear import train_rl
from megatron_klear.session import serving, transports
from megatron_klear.session.launch import leave, run_entry
from megatron_klear.weight_sync import DistributedTransport
from megatron_klear.weight_sync.buckets import Bucket
from tests.e2e.served_runs import command_line

KILLED, STOPPED = 2, 5
"""Versions in whose broadcast that happens, between the first bucket and the second: to engine 0, then to engine 1."""
WHOLE_AGAIN = 4
"""Version that is published only when both servers are there again."""
SERVERS = 2


class Failing(DistributedTransport):
    """Loses a server between two buckets."""

    def begin(self, version: int) -> None:
        self.version, self.buckets = version, 0
        super().begin(version)

    def send(self, bucket: Bucket) -> None:
        if self.buckets == 1 and len(self._engines.callers) == SERVERS:
            found = server(self._engines.callers[0].url)
            if self.version == KILLED:
                found.kill()
                # A bucket of so small a model is too short to be cut off: none of it is sent, as when gloo is held up
                # by the dead one, and the other server waits for it.
                assert self._group is not None
                self._group.broadcast = lambda flat: Future()  # type: ignore[method-assign]
            elif self.version == STOPPED:
                for process in [found, *found.children(recursive=True)]:
                    process.suspend()
        self.buckets += 1
        super().send(bucket)


class Patient(serving.ServedEngine):
    """Waits for the server that is started anew, so that the run does not end before it is back."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        deadline = time.monotonic() + 240.0
        while version == WHOLE_AGAIN and self._group is not None and len(self._group.callers) < SERVERS:
            assert time.monotonic() < deadline
            self.alive()
            time.sleep(0.1)
        super().update_weights(named_tensors, version=version)


def server(url: str) -> psutil.Process:
    """The process that serves a port, the oldest of it."""
    wanted = f"--port\0{urlsplit(url).port}\0"
    pids: list[Any] = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    lines = {pid: command_line(pid) for pid in pids}
    found = [psutil.Process(int(pid)) for pid, line in lines.items() if wanted in line and "supervisor.py" not in line]
    return min(found, key=psutil.Process.create_time)


if __name__ == "__main__":
    transports.DistributedTransport = Failing  # type: ignore[misc]
    from megatron_klear.session import rollouts

    rollouts.ServedEngine = Patient  # type: ignore[misc]
    leave(run_entry("rl", train_rl.main))
