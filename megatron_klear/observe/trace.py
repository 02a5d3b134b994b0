"""What a trace of torch's profiler says: time in our ranges, and the kernels (on a CPU: operations) that took most.

python -m megatron_klear.observe.trace TRACE.json.gz
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.errors import EXIT_BAD_INPUT, EXIT_DONE

_MOST = 15


@dataclass(frozen=True, slots=True)
class Total:
    """Everything of one name.

    Attributes:
        name: of the range, kernel or operation.
        count: how often.
        seconds: their durations added up; what runs inside counts too.
    """

    name: str
    count: int
    seconds: float


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The finished events of a trace.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    raw = path.read_bytes()
    content = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ValueError("no traceEvents in it")
    return [event for event in content["traceEvents"] if event.get("ph") == "X"]


def totals(events: Sequence[dict[str, Any]], *categories: str) -> list[Total]:
    """Events of some categories, added up by name, the longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") in categories:
            count, microseconds = sums.get(event["name"], (0, 0.0))
            sums[event["name"]] = (count + 1, microseconds + float(event["dur"]))
    found = [Total(name, count, microseconds / 1e6) for name, (count, microseconds) in sums.items()]
    return sorted(found, key=lambda total: -total.seconds)


def summary(events: Sequence[dict[str, Any]]) -> str:
    """Tables of ranges and of kernels, for people."""
    kernels = totals(events, "kernel")
    title = "kernel" if kernels else "operation (with what it calls)"
    tables = [
        ("range", totals(events, "user_annotation")),
        (title, kernels or totals(events, "cpu_op")),
    ]
    lines = []
    for heading, rows in tables:
        lines.append(f"{'seconds':>10} {'times':>7}  {heading}")
        lines += [f"{row.seconds:10.4f} {row.count:7d}  {row.name[:90]}" for row in rows[:_MOST]]
        if len(rows) > _MOST:
            lines.append(f"{sum(row.seconds for row in rows[_MOST:]):10.4f} {'':7}  {len(rows) - _MOST} more")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the summary of the trace that the argument names; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m megatron_klear.observe.trace TRACE.json[.gz]", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        print(summary(read_trace(Path(arguments[0]))), end="")
    except (OSError, ValueError, EOFError) as error:
        print(f"{arguments[0]}: not a trace that can be read: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
