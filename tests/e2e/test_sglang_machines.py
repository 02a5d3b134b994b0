"""Two machines of the trainer, each with a real SGLang server, in an asynchronous run that also evaluates."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader
from tests.e2e.served_runs import CONFIG, command_line, servers_of, wait_for

HOSTS = ("127.0.0.1", "127.0.0.2")


def test_every_machine_serves_grades_and_takes_its_servers_with_it(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    """The second machine's server is killed and comes back there; then its trainer process is."""
    run = tmp_path / "machines"
    overrides = [
        *rl_overrides("machines"), "rl.steps=1000", "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}",
        "sglang.stream_interval=4", "scheduling.mode=async", "scheduling.max_staleness=2",
        "scheduling.order=completion", "scheduling.stall_seconds=60", "evaluation.every_steps=2",
        "reward.require_think=false", "checkpoint.every_steps=0",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides, hosts=HOSTS)
    wait_for(3, run, launch)
    assert sorted(map(host_of, servers_of(run))) == sorted(HOSTS)
    [server] = [server for server in servers_of(run) if host_of(server) == HOSTS[1]]
    server.send_signal(signal.SIGKILL)
    until(lambda: "is back with the current weights" in launch.output(), launch)
    back = last_step(run)
    wait_for(back + 3, run, launch)
    assert sorted(map(host_of, servers_of(run))) == sorted(HOSTS)

    # Evaluations: of every due step, whole, and never of old weights (another version would have ended the run).
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row[names.ACCURACY_HELDOUT_COUNT] for row in rows if row["phase"] == "eval"}
    assert [evaluated.get(step) for step in range(0, back + 3, 2)] == [8] * len(range(0, back + 3, 2))
    steps = [row for row in rows if row["phase"] == "rl"]
    # Float32 on both sides, where all tokens are of the newest weights; those of the first step are.
    fresh = [row[names.MISMATCH_MAX_ABS] for row in steps if row[names.MISMATCH_SHARE_STALE] == 0.0]
    assert fresh
    assert all(0.0 <= value < 1e-4 for value in fresh)
    with LedgerReader(run / "ledger.sqlite") as reader:
        for step in range(1, back + 3):
            groups = reader.groups_of_step(step)
            assert len(groups) == 8
            assert all(0 <= step - 1 - group.oldest_version <= 2 for group in groups)
            assert all(grade.outcome != "ungraded" for group in groups for grade in group.grades.values())

    # A trainer process is killed: the servers of its machine end at once, those of the other with the run.
    here = [server for server in servers_of(run) if host_of(server) == HOSTS[1]]
    launch.processes[1].send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(here, timeout=20)
    assert not alive
    launch.started = time.monotonic()
    assert launch.wait(120)[0] == 1
    deadline = time.monotonic() + 30
    while servers_of(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not servers_of(run)


def host_of(server: psutil.Process) -> str:
    words = command_line(str(server.pid)).split("\0")
    return words[words.index("--host") + 1]


def last_step(run: Path) -> int:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(row["step"] for row in rows if row["phase"] == "rl")


def until(reached: Callable[[], bool], launch: Any) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline, launch.output()
        assert all(process.poll() is None for process in launch.processes), launch.output()
        time.sleep(0.1)
