"""Steps under each mode and order: what they are trained on, how old it is, and what a publish does to it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Rollout
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.simulation import run_simulated

BUDGET = 120


def check_ledger(world, steps, num_prompts=10):
    """Every prompt that was walked over is trained exactly once, and the trainer saw just that."""
    with LedgerReader(world.ledger.file) as reader:
        assert reader.trained_not_once() == []
    trained = [key for _, key, _ in world.trace]
    assert len(trained) == len(set(trained)) == steps * world.per_step
    rows = world.ledger.connection.execute("SELECT epoch || '/' || prompt_id, step FROM groups WHERE state = 'trained'")
    assert dict(rows.fetchall()) == {key: step for step, key, _ in world.trace}


@pytest.mark.parametrize("order", ["fixed", "completion"])
@pytest.mark.parametrize(
    ("mode", "partial", "bound"),
    [("sync", True, 0), ("one_step_off", True, 1), ("async", True, 2), ("async", False, 2), ("async", True, 0)],
)
def test_every_prompt_once_within_the_staleness_bound(make_world, mode, partial, bound, order):
    world = make_world(mode=mode, order=order, partial_rollouts=partial, max_staleness=bound).run(8)
    check_ledger(world, 8)
    assert max(world.staleness_seen) <= bound
    if bound and mode == "async":
        assert max(world.staleness_seen) == bound, "engines work as far ahead as they may"
    assert world.scheduler.drawn_again == 0, "nothing is generated in vain"
    spans = {len(r.policy_versions) for g in world.groups_seen for r in g.rollouts.values()}
    assert (max(spans) > 1) == (mode == "async" and partial and bound > 0)
    if order == "fixed":
        walk = [f"{i // 10}/p{i % 10}" for i in range(8 * world.per_step)]
        assert [key for _, key, _ in world.trace] == walk


def test_completion_order_trains_what_is_ready_first(make_world):
    fixed = make_world(mode="async", max_staleness=4, order="fixed", engines=2).run(6, num_prompts=40)
    free = make_world(mode="async", max_staleness=4, order="completion", engines=2).run(6, num_prompts=40)
    assert [key for _, key, _ in free.trace] != [key for _, key, _ in fixed.trace]
    assert max(free.staleness_seen) <= 4


def test_on_policy_steps_are_a_function_of_seed_and_version(make_world):
    """Neither the number of engines nor their speed shows in what is trained."""
    one = make_world(engines=1).run(5)
    three = make_world(engines=3, slots=2, in_flight=2).run(5)
    assert one.trace == three.trace


def test_interrupted_responses_keep_their_tokens_versions_and_budget(make_world):
    """Each token, logprob and version of a response is what some engine answered, in order, up to the budget."""
    world = make_world(mode="async", max_staleness=3, engines=2, slots=3)
    parts: dict[tuple[str, ...], list] = {}
    for engine in world.engines:
        real = engine.generate

        async def recording(request, on_tokens=None, real=real):
            part = await real(request, on_tokens)
            key = tuple(request.request_id.split("-")[1:3])
            parts.setdefault(key, []).append((request, part))
            return part

        engine.generate = recording
    world.run(10)
    several, seeds = 0, set()
    for group in world.groups_seen:
        for index, rollout in group.rollouts.items():
            answered = parts[(str(group.group_id), str(index))]
            tokens = np.concatenate([part.token_ids for _, part in answered])
            assert rollout.response_ids.tolist() == tokens.tolist()
            logprobs = np.concatenate([part.logprobs for _, part in answered])
            assert rollout.rollout_logprobs.tobytes() == logprobs.tobytes()
            per_token = [v for _, part in answered for v, count in part.policy_versions for _ in range(count)]
            assert [v for v, count in rollout.policy_versions for _ in range(count)] == per_token
            prompt = len(group.prompt.token_ids)
            for request, _ in answered:
                had = len(request.token_ids) - prompt
                assert request.token_ids[prompt:].tolist() == tokens[:had].tolist()
                assert request.max_new_tokens == BUDGET - had
            assert len(tokens) <= BUDGET
            assert (rollout.finish_reason == "length") == (len(tokens) == BUDGET and tokens[-1] != 7)
            assert len({request.seed for request, _ in answered}) == 1
            seeds.add(answered[0][0].seed)
            several += len(rollout.policy_versions) > 1
    assert several > 3
    assert len(seeds) == sum(len(group.rollouts) for group in world.groups_seen)


def test_a_step_asked_for_twice_is_the_same(make_world):
    world = make_world(order="completion")
    taken = []
    original = world._note

    def note(step, groups):
        original(step, groups)
        taken.append([g.group_id for g in groups])

    world._note = note
    world.run(2)
    assert world.ledger.of_step(1) == taken[0]
    assert world.ledger.of_step(2) == taken[1]


def test_in_flight_is_bounded_per_engine(make_world):
    world = make_world(engines=2, in_flight=3, slots=50, per_step=10)
    most = []
    for engine in world.engines:
        real = engine.generate

        async def counting(request, on_tokens=None, real=real, engine=engine):
            most.append(engine.running + 1)
            return await real(request, on_tokens)

        engine.generate = counting
    world.run(2, num_prompts=50)
    assert max(most) == 3


def test_responses_of_a_group_share_an_engine_when_nothing_speaks_against_it(make_world):
    world = make_world(engines=4, in_flight=64, per_step=8)
    world.run(1, num_prompts=50)
    where = {}
    for number, engine in enumerate(world.engines):
        for request_id in engine.requests_seen:
            where.setdefault(request_id.split("-")[1], set()).add(number)
    assert all(len(engines) == 1 for engines in where.values())
    loads = [len(engine.requests_seen) for engine in world.engines]
    assert max(loads) - min(loads) <= 4


def test_groups_too_old_for_a_smaller_bound_are_drawn_again(make_world):
    """A ledger left by an asynchronous run, continued on-policy: same prompts, new responses where they must be."""
    first = make_world(mode="async", max_staleness=3, engines=2)
    first.run(3)
    old = [g for g in first.ledger.load(first.ledger.unfinished()) if g.rollouts]
    assert any(g.oldest_version < 3 for g in old)
    again = make_world(mode="sync", ledger=first.ledger, done_steps=3)
    for engine in again.engines:
        engine.version = 3
    again.run(7)
    assert max(again.staleness_seen) == 0
    assert again.scheduler.drawn_again > 0
    again.trace[:0] = first.trace
    check_ledger(again, 7)


def test_a_head_that_fills_a_smaller_budget_ends_there(make_world):
    """A ledger of responses begun under a larger budget: no request of no tokens, and exactly the budget's worth."""
    world = make_world(mode="async", engines=1, per_step=1, max_staleness=1)
    [(epoch, prompt)] = world.prompts(0, 1, 10)
    [group] = world.ledger.reserve([(epoch, prompt)], num_responses=2)
    heads = {}
    for index, length in enumerate((BUDGET + 5, BUDGET)):
        heads[index] = Rollout(
            response_ids=np.arange(length) + 10,
            rollout_logprobs=-np.arange(length, dtype=np.float32),
            finish_reason="abort",
            policy_versions=((0, BUDGET - 3), (1, length - BUDGET + 3)),
        )
        world.ledger.save_response(group, index, heads[index])
    world.done_steps = 1
    world.engines[0].version = 1
    asked = []
    real = world.engines[0].generate

    async def recording(request, on_tokens=None):
        asked.append(request)
        return await real(request, on_tokens)

    world.engines[0].generate = recording
    world.run(3)
    [taken] = [g for g in world.groups_seen if g.group_id == group]
    for index, head in heads.items():
        rollout = taken.rollouts[index]
        assert rollout.finish_reason == "length"
        assert rollout.response_ids.tolist() == head.response_ids[:BUDGET].tolist()
        assert rollout.rollout_logprobs.tobytes() == head.rollout_logprobs[:BUDGET].tobytes()
        assert rollout.policy_versions == ((0, BUDGET - 3), (1, 3))
    assert asked
    assert all(request.request_id.split("-")[1] != str(group) for request in asked)
    assert min(request.max_new_tokens for request in asked) >= 1


@pytest.mark.parametrize("order", ["fixed", "completion"])
def test_a_step_that_nothing_can_fill_is_an_error_and_no_endless_wait(make_world, order):
    """Prompts that the ledger has lost and that nobody submits again."""
    world = make_world(mode="one_step_off", order=order)
    said = []

    async def waits(scheduler):
        await scheduler.start(version=0, next_step=1)
        scheduler.add(world.ledger.reserve(world.prompts(0, 6, 10), num_responses=2))
        await scheduler.resume(0)
        assert await scheduler.take(1, 4, 0.001) is None, "engines are at work"
        groups = None
        while groups is None:
            groups = await scheduler.take(1, 4, 5.0)
        world.ledger.trained(1)
        scheduler.trained(1)
        await scheduler.pause()
        for engine in world.engines:
            engine.version = 1
        await scheduler.resume(1)
        try:
            for _ in range(100):
                assert await scheduler.take(2, 4, 5.0) is None
        except RolloutError as error:
            said.append(str(error))
        finally:
            await scheduler.close()

    run_simulated(waits(world.make_scheduler()))
    [message] = said
    assert "step 2 waits for 4 prompt groups and nothing is being generated or graded: of 2 that" in message
    assert str(world.ledger.file) in message
