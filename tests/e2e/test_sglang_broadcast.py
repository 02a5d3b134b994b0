"""Real servers that are lost in the middle of a broadcast of weights: the run goes on without them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_klear.config.serving import SglangSettings
from megatron_klear.observe import names
from tests.e2e.broadcast_worker import KILLED, SERVERS, STOPPED
from tests.e2e.served_runs import CONFIG, check_ledger, published, servers_of, step_rows

STEPS, PER_STEP = 6, 8


def test_a_killed_receiver_comes_back_and_a_hung_one_is_done_without(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
) -> None:
    """Two tensor ranks, which repeat the export together. Synchronous: every token is of the version just published."""
    run = tmp_path / "broadcast"
    overrides = [
        *rl_overrides("broadcast"), "evaluation.at_end=false", "reward.require_think=false", f"rl.steps={STEPS}",
        "parallel.tp=2", "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}", f"sglang.servers={SERVERS}",
        "sglang.stream_interval=4", "scheduling.mode=sync", "scheduling.stall_seconds=60",
        "weight_sync.transport=distributed", "weight_sync.bucket_bytes=16384", "weight_sync.timeout_seconds=6",
    ]  # fmt: skip
    worker = str(Path(__file__).with_name("broadcast_worker.py"))
    launch = start(worker, CONFIG, overrides)
    assert launch.wait(500) == [0, 0], launch.output()
    output = launch.output()

    for version, lost, left in ((KILLED, 0, 1), (STOPPED, 1, 0)):
        before, after = (output.index(f"published version {number}: ") for number in (version - 1, version))
        meanwhile = output[before:after]
        assert re.search(rf"engine {lost} \(\S+: /update_weights_from_distributed: .*; publishing goes on", meanwhile)
        assert f"broke off; all of them are sent again to engine {left} " in meanwhile
    lost_to_the_manager = re.findall(r"engine (\d) \(\S+\) is lost: .* it was left out of a publish", output)
    assert lost_to_the_manager == ["0", "1"]
    assert output.count("is back with the current weights") == 1
    assert "serves again, with version 4" in output

    assert published(launch) == list(range(STEPS + 1))
    assert output.count("proved by checksum") == STEPS + 1
    # Float32 on both sides; a part of old weights would be off by far more.
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in step_rows(run))
    check_ledger(run, steps=STEPS, per_step=PER_STEP, staleness=0)
    # The killed one missed that publish and the next; the hung one had not come back when the run ended.
    logs = [(run / "logs" / f"engine_{i}.log").read_text(errors="replace") for i in range(SERVERS)]
    assert [log.count("POST /continue_generation ") for log in logs] == [5, 5]
    assert "Failed to receive weights" in logs[1], "it did not wait in the broadcast when the other one was killed"
    assert not servers_of(run)
