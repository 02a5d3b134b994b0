"""How busy engines were, by hand in simulated time."""

from __future__ import annotations

import asyncio

import pytest

from megatron_klear.rollout.manager.load import Load
from megatron_klear.rollout.simulation import SimulatedEngine, run_simulated
from tests.rollout.manager.conftest import M


def test_means_over_time_by_hand() -> None:
    clock = [10.0]
    load = Load(lambda: clock[0])
    load.take()
    load.sent(first_of_engine=True)
    clock[0] = 12.0
    load.sent(first_of_engine=False)
    load.sent(first_of_engine=True)
    clock[0] = 16.0
    load.ended(last_of_engine=False)
    load.brought(30)
    clock[0] = 20.0
    # One request for 2 s, three for 4 s, two for 4 s; one engine for 2 s, two for 8 s.
    assert load.take() == (pytest.approx(2.2), pytest.approx(1.8), pytest.approx(3.0))
    clock[0] = 24.0
    assert load.take() == (2.0, 2.0, 0.0), "from where it was"
    assert load.take() == (0.0, 0.0, 0.0), "no time has passed"


def test_the_load_of_engines_that_answer_and_then_stand_idle(make_world) -> None:
    """Four responses of six tokens, half a second each, over two engines with one at a time: busy for six seconds."""
    world = make_world(engines=2, in_flight=1)
    world.engines[:] = [
        SimulatedEngine(f"engine {i}", remaining=lambda _: 6, slots=1, seconds_per_token=0.5) for i in range(2)
    ]
    found: list[tuple[float, float, float]] = []

    async def step() -> None:
        scheduler = world.make_scheduler()
        try:
            await scheduler.start(version=0, next_step=1)
            await scheduler.resume(0)
            loop = asyncio.get_running_loop()
            began = loop.time()
            scheduler.add(world.ledger.reserve(world.prompts(0, 2, 2), num_responses=M))
            assert await scheduler.take(1, 2) is not None
            await asyncio.sleep(12.0 - (loop.time() - began))
            found.append(scheduler.dispatcher.load.take())
        finally:
            await scheduler.close()

    run_simulated(step())
    assert found == [(pytest.approx(1.0, rel=0.02), pytest.approx(1.0, rel=0.02), pytest.approx(2.0, rel=0.02))]
