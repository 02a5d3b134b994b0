"""A server that is lost between the start and the first publish: the run goes on without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.config.serving import SglangSettings
from tests.e2e.served_runs import CONFIG, check_ledger, published, servers_of

WORKER = str(Path(__file__).with_name("lost_at_start_worker.py"))


@pytest.mark.parametrize("how", ["killed", "unstarted"])
def test_the_first_publish_goes_on_without_a_server_that_was_lost_before_it(
    start: Callable[..., Any],
    rl_overrides: Callable[[str], list[str]],
    tmp_path: Path,
    sglang_settings: SglangSettings,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    monkeypatch.setenv("LOST", how)
    run = tmp_path / "run"
    overrides = [
        *rl_overrides("run"), "rl.steps=5", "evaluation.at_end=false", "checkpoint.every_steps=0",
        "reward.require_think=false", "sglang.servers=2", "scheduling.mode=sync",
        "rollout.engine=sglang", f"sglang.venv={sglang_settings.venv}", "sglang.stream_interval=4",
    ]  # fmt: skip
    launch = start(WORKER, CONFIG, overrides)
    assert launch.wait(500) == [0, 0], launch.output()
    output = launch.output()
    before_first = output[: output.index("published version 0: ")]
    if how == "killed":
        assert "publishing goes on with 1 engines" in before_first
        assert re.search(r"engine 1 \(http://.*\) ended with status 137; the end of .*engine_1.log:\n", output)
    else:
        assert re.search(r"the run begins without engine 1: SGLang server 1 ended with status 3.*:\nno memory", output)
    assert published(launch) == list(range(6))
    check_ledger(run, steps=5, per_step=8, staleness=0)
    assert "it was left out of a publish" in output
    assert not servers_of(run)
