"""What a publish moves and how long it takes, by hand for every transport and for the recipe's fleets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_klear.config import Settings
from megatron_klear.planning import make_plan
from megatron_klear.planning.assumptions import assumptions_in_words

Make = Callable[..., Settings]
MODEL = 2 * 8_190_735_360
"""Bytes of Qwen3-8B in bfloat16."""
ELSEWHERE = "sglang.urls=[http://node5:30000,http://node5:30001,http://node6:30000]"
HERE = "sglang.urls=[http://127.0.0.1:30000,http://localhost:30001]"
UNKEPT = "weight_sync.keep_on_disk=false"


@pytest.mark.parametrize(
    ("gpus", "overrides", "way", "moved", "rate"),
    [
        # Servers on four machines, and servers named by address: one broadcast at 80 % of 400 Gb/s.
        (32, (), "broadcast", MODEL, 40e9),
        (32, ("sglang.servers=8",), "broadcast", MODEL, 40e9),
        (8, (ELSEWHERE,), "broadcast", MODEL, 40e9),
        (8, ("weight_sync.transport=distributed",), "node broadcast", MODEL, 360e9),
        # On the only machine: out of the trainer once, into each engine once.
        (8, ("sglang.servers=4",), "host", 5 * MODEL, 20e9),
        (8, (HERE,), "host", 3 * MODEL, 20e9),
        # Base64 makes four bytes of three, and each of an engine's two GPUs is sent the whole.
        (8, (ELSEWHERE, "weight_sync.transport=tensor", "sglang.server_tp=2"), "requests", 8 * MODEL, 20e9),
        # Each GPU reads and writes its half of the weights at 80 % of 3.35 TB/s.
        (8, ("sglang.placement=colocated", "sglang.server_tp=2"), "same device", MODEL / 2, 1.34e12),
    ],
)
def test_a_publish_by_hand(
    settings_for: Make, gpus: int, overrides: tuple[str, ...], way: str, moved: float, rate: float
) -> None:
    settings = settings_for("rollout.engine=sglang", UNKEPT, *overrides, entry="rl", gpus=gpus)
    plan = make_plan(settings, entry="rl", gpus=gpus, device_name="h100")
    assert plan.publishing is not None
    assert (plan.publishing.way, plan.publishing.file_bytes) == (way, 0.0)
    assert plan.publishing.moved == pytest.approx(moved, rel=1e-12)
    assert plan.time.publish == pytest.approx(moved / rate, rel=1e-12)
    assert plan.traffic.publish == pytest.approx(moved if "broadcast" in way or way == "requests" else 0.0)
    (told,) = (line for line in assumptions_in_words(plan) if line.startswith("weights are published"))
    assert f": {moved / 1e9:,.1f} GB at {rate / 1e9:,.0f} GB/s" in told


def test_files_are_written_while_weights_are_sent(settings_for: Make) -> None:
    """16.4 GB at 2 GB/s take longer than the broadcast; three engines read them from a disk, once they are there."""
    seconds = {}
    for transport in ("auto", "disk"):
        settings = settings_for(
            "rollout.engine=sglang", ELSEWHERE, f"weight_sync.transport={transport}", entry="rl", gpus=32
        )
        plan = make_plan(settings, entry="rl", gpus=32, device_name="h100")
        seconds[transport] = plan.time.publish
        assert any("GB at 2 GB/s, a guess" in line for line in assumptions_in_words(plan))
    assert seconds["auto"] == pytest.approx(MODEL / 2e9)
    assert seconds["disk"] == pytest.approx(4 * MODEL / 2e9)


def test_behind_a_router_nothing_is_kept_and_without_servers_nothing_is_published(settings_for: Make) -> None:
    router = ("rollout.engine=sglang", ELSEWHERE, "sglang.router_url=http://node5:40000")
    plan = make_plan(settings_for(*router, entry="rl"), entry="rl", gpus=8, device_name="h100")
    assert plan.time.publish == pytest.approx(MODEL / 40e9)
    for entry in ("rl", "sft"):
        plan = make_plan(settings_for(entry=entry), entry=entry, gpus=8, device_name="h100")  # type: ignore[arg-type]
        assert plan.publishing is None
        assert plan.time.publish == plan.traffic.publish == 0.0
