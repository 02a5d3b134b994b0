"""The RL loop with real SGLang servers: two trainer ranks, weights published and proved every step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_klear.config import load_settings
from megatron_klear.config.serving import SglangSettings
from megatron_klear.model import hf_config
from megatron_klear.observe import names
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.sglang import ServerFleet
from tests.e2e.conftest import TINY
from tests.e2e.corrupting_worker import DAMAGED
from tests.e2e.served_runs import CONFIG, check_ledger, published, servers_of, step_rows, wait_for

PER_STEP = 8
VARIED = ["evaluation.at_end=false", "reward.require_think=false", "sglang.stream_interval=4"]

Overrides = Callable[[str], list[str]]


def test_async_a_killed_server_comes_back_with_current_weights_and_a_killed_trainer_trains_every_prompt_once(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, sglang_settings: SglangSettings
) -> None:
    """Asynchronous, with partial rollouts: the only server is killed in the middle, and later both ranks are."""
    steps, run = 9, tmp_path / "killed"
    overrides = [
        *rl_overrides("killed"), *VARIED, f"rl.steps={steps}", "rollout.engine=sglang",
        f"sglang.venv={sglang_settings.venv}", "scheduling.mode=async", "scheduling.max_staleness=2",
        "scheduling.order=completion", "scheduling.stall_seconds=60", "checkpoint.every_steps=2",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    wait_for(3, run, launch)
    servers_of(run)[0].send_signal(signal.SIGKILL)
    wait_for(6, run, launch)
    launch.signal(signal.SIGKILL)
    launch.wait(900)
    assert "is back with the current weights" in launch.output()
    # The configuration has servers generate 128 responses at a time; scheduling.in_flight is 256.
    assert "an engine gets 128 requests at a time" in launch.output()
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait(900) == [0, 0], launch.output()
    check_ledger(run, steps=steps, per_step=PER_STEP, staleness=2)
    with LedgerReader(run / "ledger.sqlite") as reader:
        groups = [group for step in range(1, steps + 1) for group in reader.groups_of_step(step)]
    drawn = [rollout.policy_versions for group in groups for rollout in group.rollouts.values()]
    assert any(len(versions) > 1 for versions in drawn), "no response was continued under new weights"
    assert all(later == sorted(later) for later in ([version for version, _ in versions] for versions in drawn))
    assert not servers_of(run)


@pytest.mark.parametrize("pause_mode", ["retract", "in_place"])
def test_async_a_publish_holds_unfinished_responses_in_the_server(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, sglang_settings: SglangSettings, pause_mode: str
) -> None:
    """None is interrupted, and those that were in flight go on under the new weights."""
    steps, run = 5, tmp_path / pause_mode
    launch = start(
        "train_rl", CONFIG,
        [*rl_overrides(pause_mode), *VARIED, f"rl.steps={steps}", "rollout.engine=sglang",
         f"sglang.venv={sglang_settings.venv}", "scheduling.mode=async", "scheduling.max_staleness=2",
         "scheduling.order=completion", f"weight_sync.pause_mode={pause_mode}",
         "rollout.batch_responses=4"],  # few at a time, so that the trainer waits for them and not they for it
    )  # fmt: skip
    assert launch.wait(900) == [0, 0], launch.output()
    assert published(launch) == list(range(steps + 1))
    check_ledger(run, steps=steps, per_step=PER_STEP, staleness=2)
    with LedgerReader(run / "ledger.sqlite") as reader:
        groups = [group for step in range(1, steps + 1) for group in reader.groups_of_step(step)]
    drawn = [rollout.policy_versions for group in groups for rollout in group.rollouts.values()]
    assert any(len(versions) > 1 for versions in drawn), "no response went on under new weights"
    rows = step_rows(run)
    assert sum(row[names.REQUESTS_INTERRUPTED] + row[names.REQUESTS_FAILED] for row in rows) == 0
    assert sum(row[names.REQUESTS_SENT] for row in rows) == steps * PER_STEP * 4, "one request a response"


def test_one_step_off_by_broadcast_to_a_server_that_was_lost_and_is_proved_by_logprobs(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, sglang_settings: SglangSettings
) -> None:
    """Two pipeline stages. The server started anew is proved by logprobs, too, and the group is made anew with it."""
    steps, run = 7, tmp_path / "one_off"
    overrides = [
        *rl_overrides("one_off"), *VARIED, f"rl.steps={steps}", "parallel.pp=2", "rollout.engine=sglang",
        f"sglang.venv={sglang_settings.venv}", "scheduling.mode=one_step_off", "scheduling.stall_seconds=60",
        "weight_sync.transport=distributed", "weight_sync.verify=logprobs", "weight_sync.logprob_tolerance=1.0e-4",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    wait_for(3, run, launch)
    servers_of(run)[0].send_signal(signal.SIGKILL)
    assert launch.wait(900) == [0, 0], launch.output()
    output = launch.output()
    assert "is back with the current weights" in output
    assert published(launch) == list(range(steps + 1))
    # A publish that found no server was kept for the one that starts; all others were proved before a token was drawn.
    kept = output.count("kept for servers that start")
    assert output.count("proved by logprobs") == steps + 1 - kept
    assert kept <= 2
    joined = (run / "logs" / "engine_0.log").read_text(errors="replace").count("POST /init_weights_update_group ")
    assert joined == 2
    check_ledger(run, steps=steps, per_step=PER_STEP, staleness=1)
    assert not servers_of(run)


class Alone:
    """A server that no trainer owns."""

    def __init__(self, fleet: ServerFleet, log: Path, process: psutil.Process) -> None:
        self.url, self._log, self._processes = fleet.url(0), log, [process, *process.children(recursive=True)]

    def wait_for_prompts(self) -> None:
        """Wait until it begins with prompts that come from now on."""
        known = self._log.stat().st_size
        deadline = time.monotonic() + 120
        while b"Prefill batch" not in self._log.read_bytes()[known:]:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


@pytest.fixture(scope="module")
def alone_server(
    data: Path, tmp_path_factory: pytest.TempPathFactory, sglang_settings: SglangSettings
) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("alone")
    files = [f"tokenizer.dir={data / 'tokenizer'}", f"data.prompts=[{data / 'prompts.jsonl'}]"]
    files += [f"data.heldout=[{data / 'heldout.jsonl'}]", "checkpoint.start_from=null"]
    arch = load_settings(CONFIG, [*TINY, *files], entry="rl", world_size=2).architecture
    with ServerFleet(
        sglang_settings, hf_config(arch, dtype="float32"), folder, dtype="float32", on_cpu=True, batch_responses=32,
        longest_sequence=88,
    ) as fleet:  # fmt: skip
        fleet.start_all()
        yield Alone(fleet, folder / "logs" / "engine_0.log", servers_of(folder)[0])


@pytest.fixture
def alone(alone_server: Alone) -> Iterator[Alone]:
    yield alone_server
    alone_server.signal(signal.SIGCONT)


def test_sync_with_a_server_of_others_that_falls_silent_and_comes_back_and_a_damaged_tensor_is_named(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, alone: Alone
) -> None:
    """Two pipeline stages, through shared memory; then two tensor ranks, whose second publish is damaged on its way."""
    steps, run = 5, tmp_path / "guest"
    served = [*VARIED, "rollout.engine=sglang", f"sglang.urls=[{alone.url}]", "weight_sync.transport=tensor"]
    overrides = [
        *rl_overrides("guest"), *served, f"rl.steps={steps}", "parallel.pp=2", "scheduling.stall_seconds=4",
        "rollout.max_response_tokens=40",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    wait_for(2, run, launch)
    alone.wait_for_prompts()
    alone.signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "is lost: brought no token" not in launch.output():
        assert time.monotonic() < deadline, launch.output()
        time.sleep(0.1)
    alone.signal(signal.SIGCONT)
    assert launch.wait(900) == [0, 0], launch.output()
    output = launch.output()
    assert output.index("serves again, with version") > output.index("is lost: brought no token")
    assert published(launch) == list(range(steps + 1))
    assert output.count("proved by checksum") == steps + 1
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in step_rows(run))
    check_ledger(run, steps=steps, per_step=PER_STEP, staleness=0)

    damaged = tmp_path / "damaged"
    worker = str(Path(__file__).with_name("corrupting_worker.py"))
    launch = start(worker, CONFIG, [*rl_overrides("damaged"), *served, "rl.steps=3", "parallel.tp=2"])
    assert launch.wait(240) == [1, 1], launch.output()
    # SGLang holds the projections of queries, keys and values as one tensor.
    fused = DAMAGED.replace("k_proj", "qkv_proj")
    assert f"an engine's weights are not the trainer's: engine 0 ({alone.url}): 1 differ: {fused}" in launch.output()
    assert published(launch) == [0]
    with LedgerReader(damaged / "ledger.sqlite") as reader:
        assert reader.steps() == [1], "nothing may be sampled from weights of which is not known which they are"


@pytest.mark.parametrize(("layout", "transport"), [("tp", "tensor"), ("pp", "disk"), ("pp", "distributed")])
def test_every_publish_of_a_run_is_proved_by_checksum(
    start: Callable[..., Any], rl_overrides: Overrides, tmp_path: Path, alone: Alone, layout: str, transport: str
) -> None:
    """Stages through memory stand above; tensor ranks by files and by broadcast in test_sglang_fixed_order and
    test_sglang_broadcast. The run before may have left the server paused, with some of its weights damaged."""
    steps, run = 3, tmp_path / "proved"
    overrides = [
        *rl_overrides("proved"), *VARIED, "rollout.engine=sglang", f"sglang.urls=[{alone.url}]",
        f"parallel.{layout}=2", f"weight_sync.transport={transport}", f"rl.steps={steps}",
    ]  # fmt: skip
    launch = start("train_rl", CONFIG, overrides)
    assert launch.wait(240) == [0, 0], launch.output()
    assert published(launch) == list(range(steps + 1))
    assert launch.output().count("proved by checksum") == steps + 1
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in step_rows(run))
    check_ledger(run, steps=steps, per_step=PER_STEP, staleness=0)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sglang.venv=/nowhere", "sglang.venv: no /nowhere/bin/python; run tools/setup_sglang.sh"),
        ("sglang.urls=[http://127.0.0.1:9]", "sglang.urls: engine 0 (http://127.0.0.1:9): /server_info: no connection"),
        ("sglang.urls=[localhost:30000]", "sglang.urls: got 'localhost:30000', must be http://HOST:PORT"),
    ],
)
def test_what_cannot_be_reached_stops_every_rank_with_status_2(
    start: Callable[..., Any], rl_overrides: Overrides, override: str, text: str
) -> None:
    launch = start("train_rl", CONFIG, [*rl_overrides("unserved"), "rollout.engine=sglang", override])
    assert launch.wait(240) == [2, 2], launch.output()
    assert text in launch.output()
