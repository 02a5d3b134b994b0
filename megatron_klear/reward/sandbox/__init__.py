"""Untrusted code in a kernel-enforced sandbox: bubblewrap with namespaces, resource limits and a seccomp filter.

    pool ── one slot per worker ── bubblewrap: no network, the interpreter's files only, everything read-only
                                       └─ server: a warm interpreter that never sees an answer     (inside/server.py)
                                            └─ session: PID, mount and IPC namespaces per answer
                                                 └─ test: a fork with limits, no capabilities, a seccomp filter

A session has a scratch folder in memory, made anew for every test, and is the first process of its PID namespace: code
cannot signal it, and whatever code leaves behind ends with it. Expected outputs never enter the sandbox: output and
results are compared outside. Assertions run in a process of their own, where the answer's objects are data or only
names (inside/remote.py, inside/shared.py).

Chosen by measurement (benchmarks/reward_throughput.py; figures in benchmarks/results/reward_throughput.json): on a
machine with other work a trivial test takes 26.3 ms with bubblewrap and an interpreter of its own, 7.6 ms with
bubblewrap per answer and a fork per test, and 3.0 ms in this design, in which start-up is paid once per worker; an
interpreter without any sandbox takes 7.9 ms.
"""

from __future__ import annotations

from megatron_klear.reward.sandbox.limits import Limits
from megatron_klear.reward.sandbox.process import NoTime, SandboxError, SandboxProcess, TestResult
from megatron_klear.reward.sandbox.view import SandboxMode

__all__ = ["Limits", "NoTime", "SandboxError", "SandboxMode", "SandboxProcess", "TestResult"]
