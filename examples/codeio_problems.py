"""Write code problems to reinforce on, from the tasks of reasoning-gym's CodeI/O data.

Each task of that data has a description, a program `main_solution` and a generator of inputs. Its inputs and outputs
become the tests of a problem that asks for the function: sixteen different inputs, run in the sandbox of the code
reward, as any answer is. A task is left out when its program needs packages, draws random numbers, gives fewer than
four different outputs or takes long.

    python examples/codeio_problems.py --out data/codeio.jsonl --problems 500
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_klear.errors import RewardError
from megatron_klear.reward import Limits
from megatron_klear.reward.sandbox import NoTime, SandboxError, SandboxMode, SandboxProcess

TESTS = 16
_LIMITS = Limits(cpu_seconds=4.0, wall_seconds=10.0, output_bytes=2**18)
_LONGEST_TESTS = 20_000
"""Characters of a problem's tests."""

_GENERATE = """
import json as _json
from random import Random
{generator}
def _tests(seed, wanted):
    rng, tests = Random(seed), {{}}
    for _ in range(20 * wanted):
        given = generate_inputs(rng)
        key = _json.dumps(given, sort_keys=True)
        if key not in tests:
            expected = _json.loads(_json.dumps(main_solution(**_json.loads(key))))
            tests[key] = [_json.loads(key), expected]
        if len(tests) == wanted:
            break
    return list(tests.values())
"""


def tasks() -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of each task of the data."""
    with (files("reasoning_gym") / "data" / "codeio.jsonl.gz").open("rb") as packed, gzip.open(packed, "rt") as lines:
        for number, line in enumerate(lines):
            yield number, json.loads(line)


def tests_of(sandbox: SandboxProcess, task: dict[str, Any], seed: int) -> list[dict[str, Any]] | str:
    """The tests of a task, or why it is left out."""
    program = task["code_sample"] + _GENERATE.format(generator=task["input_generator"])
    fault = sandbox.open({"task": program}, _LIMITS)
    if fault:
        sandbox.close_answer()
        return "its program cannot be compiled"
    call = {"kind": "call", "function": "_tests", "arguments": json.dumps([[seed, TESTS], {}])}
    first, second = sandbox.run(call), sandbox.run(call)
    sandbox.close_answer()
    if first.problem:
        return "it needs a package" if "ModuleNotFound" in first.problem else "its program fails or takes long"
    if first.output != second.output:
        return "its outputs differ from run to run"
    pairs = json.loads(first.output)
    if len(pairs) < TESTS:
        return f"it has fewer than {TESTS} different inputs"
    if len({json.dumps(expected) for _, expected in pairs}) < 4:
        return "it has fewer than 4 different outputs"
    if len(first.output) > _LONGEST_TESTS:
        return "its tests are long"
    return [{"kwargs": given, "output": expected} for given, expected in pairs]


def prompt_row(number: int, task: dict[str, Any], tests: list[dict[str, Any]]) -> dict[str, Any]:
    """A problem as a line of the file."""
    names = ", ".join(tests[0]["kwargs"])
    question = (
        f"{task['task_description'].strip()}\n\n{task['input_output_spec'].strip()}\n\n"
        f"Write a Python function `main_solution({names})` that returns the output, in one fenced code block."
    )
    return {
        "id": f"codeio-{number:04d}",
        "domain": "code",
        "messages": [{"role": "user", "content": question}],
        "reference": {"kind": "call", "function": "main_solution", "tests": tests, "solution": task["code_sample"]},
    }


def collect(
    limit: int, *, sandbox: SandboxMode = "bubblewrap", seed: int = 1
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Up to `limit` problems in the order of the data, and the reasons of those that were left out.

    Raises:
        RewardError: no sandbox can be made.
    """
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    process: SandboxProcess | None = None
    for number, task in tasks():
        if len(rows) == limit:
            break
        if process is None:
            process = SandboxProcess(sandbox)
            process.wait_ready()
        try:
            found = tests_of(process, task, seed)
        except NoTime as error:
            process.close_answer()
            found = str(error)
        except SandboxError as error:
            process.discard()
            process, found = None, f"the sandbox failed: {error}"
        if isinstance(found, str):
            left_out[found] += 1
        else:
            rows.append(prompt_row(number, task, found))
    if process is not None:
        process.discard()
    return rows, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--problems", type=int, default=500, metavar="N", help="most problems (default: 500)")
    parser.add_argument(
        "--sandbox", choices=["bubblewrap", "rlimits"], default="bubblewrap", help="as code_reward.sandbox"
    )
    given = parser.parse_args(arguments)
    try:
        rows, left_out = collect(given.problems, sandbox=given.sandbox)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except (OSError, RewardError) as error:
        print(f"codeio_problems: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {len(rows)} problems with {TESTS} tests each; left out:")
    for reason, count in left_out.most_common():
        print(f"  {count:5d}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
