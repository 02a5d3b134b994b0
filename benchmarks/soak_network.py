"""The network of benchmarks/soak.py: packets of a server are dropped for a while (iptables, as root)."""

from __future__ import annotations

import subprocess
import time

import psutil


def silence(server: psutil.Process, seconds: float) -> bool:
    """Drop all packets to and from a server's port for some seconds; returns whether that could be done."""
    try:
        words = server.cmdline()
        port = words[words.index("--port") + 1]
    except (psutil.Error, ValueError):
        return False
    rules = [["-i", "lo", "-p", "tcp", side, port, "-j", "DROP"] for side in ("--dport", "--sport")]
    added = [rule for rule in rules if _iptables("-I", rule)]
    try:
        if len(added) == len(rules):
            time.sleep(seconds)
    finally:
        for rule in added:
            _iptables("-D", rule)
    return len(added) == len(rules)


def can_silence() -> bool:
    """Whether packets can be dropped, tried on a port that nobody has."""
    rule = ["-i", "lo", "-p", "tcp", "--dport", "1", "-j", "DROP"]
    return _iptables("-I", rule) and _iptables("-D", rule)


def _iptables(action: str, rule: list[str]) -> bool:
    try:
        command = ["iptables", "-w", "5", action, "INPUT", *rule]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
