"""What one test of untrusted code may use."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20
CLOCK_FACTOR = 10.0
"""How many times its CPU time a test may take by the clock on a machine that is busy with other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one test; a test that passes one is failed, and the limit is named.

    Attributes:
        cpu_seconds: processor time, so that a verdict does not depend on how busy the machine is.
        wall_seconds: time by the clock, for code that waits. What a test is kept from running by others does not count,
            up to `patience_seconds`; with `allow_processes` it does.
        memory_bytes: address space of a process (RLIMIT_AS); without `allow_processes` a test is one process.
        scratch_bytes, scratch_files: what the scratch folder holds, in bytes and in files.
        file_bytes: largest file (RLIMIT_FSIZE).
        output_bytes: most that is read of a test's output, and of its errors.
        tasks: threads and processes at a time (RLIMIT_NPROC).
        open_files: file descriptors.
        stack_bytes: stack of the main thread.
        allow_processes: whether code may start processes (fork, subprocess).
    """

    cpu_seconds: float = 6.0
    wall_seconds: float = 20.0
    memory_bytes: int = 1024 * MIB
    scratch_bytes: int = 64 * MIB
    scratch_files: int = 1000
    file_bytes: int = 32 * MIB
    output_bytes: int = 4 * MIB
    tasks: int = 32
    open_files: int = 64
    stack_bytes: int = 64 * MIB
    allow_processes: bool = False

    @property
    def patience_seconds(self) -> float:
        """Time by the clock in which a test must come to its end on a busy machine, or there is no verdict."""
        return max(CLOCK_FACTOR * self.cpu_seconds, self.wall_seconds)

    def to_message(self) -> dict[str, int | float]:
        """The limits as the sandbox takes them; CPU time in whole seconds, as the kernel counts it."""
        return {
            "cpu_seconds": math.ceil(self.cpu_seconds),
            "memory_bytes": self.memory_bytes,
            "scratch_bytes": self.scratch_bytes,
            "scratch_files": self.scratch_files,
            "file_bytes": self.file_bytes,
            "output_bytes": self.output_bytes,
            "tasks": self.tasks,
            "open_files": self.open_files,
            "stack_bytes": self.stack_bytes,
        }
