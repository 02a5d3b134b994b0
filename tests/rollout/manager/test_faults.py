"""Engines that die, hang, slow down, answer nonsense or lose requests: the run goes on and its result is the same."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Rollout
from megatron_klear.rollout.endpoint import EndpointError, GeneratedPart, Silence
from megatron_klear.rollout.ledger import LedgerReader
from megatron_klear.rollout.sglang.answers import AnswerReader

STEPS = 6


@pytest.fixture
def undisturbed(make_world):
    return make_world(engines=3).run(STEPS).trace


def later(seconds, action, *arguments):
    """Do something so many simulated seconds from now."""
    asyncio.get_running_loop().call_later(seconds, action, *arguments)


def once(step, action):
    """Call `action(world)` at the start of a step."""

    def before(number, world):
        if number == step:
            action(world)

    return before


def trained_once(world):
    with LedgerReader(world.ledger.file) as reader:
        assert reader.trained_not_once() == []
    keys = [key for _, key, _ in world.trace]
    assert len(keys) == len(set(keys)) == STEPS * world.per_step


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_lost_engine_changes_nothing_but_the_time(make_world, undisturbed, fault):
    """It goes while requests run on it; no one brings it back."""
    world = make_world(engines=3, before_step=once(2, lambda w: later(1.0, getattr(w.engines[1], fault))))
    world.run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    care = world.scheduler.dispatcher.care
    assert care.lost == 1
    words = {"die": "connection re", "hang": "brought no token for"}[fault]
    assert words in world.scheduler.dispatcher.pool.engines[1].last_error


def test_an_engine_that_comes_back_with_current_weights_rejoins(make_world, undisturbed):
    def come_and_go(world):
        engine = world.engines[1]
        later(1.0, engine.die)
        later(8.0, lambda: engine.revive(world.done_steps))

    world = make_world(engines=2, before_step=once(2, come_and_go), train_seconds=10.0).run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    assert world.scheduler.dispatcher.care.rejoined == 1
    assert world.scheduler.dispatcher.pool.engines[1].status == "serving"


def test_an_engine_that_comes_back_with_old_weights_stays_out(make_world):
    """A step of 40 groups takes minutes; the engine is back after 8 s, with weights that nobody wants any more."""
    at = {}

    def come_and_go(world):
        engine = world.engines[1]
        later(1.0, engine.die)
        later(8.0, lambda: engine.revive(-5))
        later(8.1, engine.requests_seen.clear)

    def look(step, world):
        if step == 1:
            come_and_go(world)
        at[step] = (asyncio.get_running_loop().time(), list(world.engines[1].requests_seen))

    world = make_world(engines=2, slots=2, per_step=40, before_step=look).run(2, num_prompts=200)
    seconds, requests = at[2]
    assert seconds > 60.0
    assert requests == []
    assert world.engines[1].requests_seen, "after the next publish it has the right ones"


def test_restart_is_asked_for_with_the_reason_and_the_engine_rejoins(make_world, undisturbed):
    told = []

    async def restart(endpoint, why, limit):
        told.append((endpoint.name, why))
        await asyncio.sleep(3.0)
        endpoint.revive(world.scheduler.dispatcher.version)
        return endpoint

    world = make_world(engines=2, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].hang)))
    world.run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    assert [name for name, _ in told] == ["engine 0"]
    assert "scheduling.stall_seconds" in told[0][1]
    assert world.scheduler.dispatcher.care.rejoined == 1


def test_an_engine_that_starts_slowly_is_not_given_up(make_world, undisturbed):
    """Nothing comes for 50 s, far over stall_seconds: it compiles, and start_seconds is 60."""

    def compile_first(world):
        for engine in world.engines:
            real = engine.generate

            async def slow_start(request, on_tokens=None, real=real):
                if asyncio.get_running_loop().time() < 50.0:
                    await asyncio.sleep(50.0 - asyncio.get_running_loop().time())
                return await real(request, on_tokens)

            engine.generate = slow_start

    world = make_world(engines=2, before_step=once(1, compile_first), stall_seconds=5.0).run(STEPS)
    assert world.scheduler.dispatcher.care.lost == 0
    assert world.trace == undisturbed


def test_a_slow_engine_hands_its_responses_over_and_is_used_again_when_quick(make_world):
    """One that nobody can start anew keeps one request, by which it is seen to be quick again."""
    seen = []

    def look(world):
        seen.append(world.scheduler.dispatcher.pool.engines[0].is_slow)

    def slow(world):
        later(1.0, world.engines[0].change_speed, 0.5)
        later(80.0, look, world)
        later(81.0, world.engines[0].change_speed, 0.05)

    settings = {"mode": "async", "max_staleness": 2, "order": "completion", "stall_seconds": 20.0}
    world = make_world(
        engines=4, before_step=once(2, slow), per_step=16, slots=8, train_seconds=20.0, **settings
    ).run(12, num_prompts=300)  # fmt: skip
    dispatcher = world.scheduler.dispatcher
    assert dispatcher.counts["moved requests"] > 0
    assert dispatcher.care.lost == 0
    assert seen == [True]
    assert not dispatcher.pool.engines[0].is_slow


def test_a_slow_engine_is_started_anew_when_others_have_its_responses(make_world, undisturbed):
    """Also where it alone is still at work, at the end of a synchronous step."""
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append((endpoint, why, len(endpoint._runs)))
        endpoint.change_speed(0.05)
        return endpoint

    def slow(world):
        later(1.0, world.engines[0].change_speed, 5.0)

    world = make_world(engines=4, restart=restart, before_step=once(2, slow), stall_seconds=20.0).run(STEPS)
    [(endpoint, why, left)] = restarts
    assert endpoint is world.engines[0]
    assert "times slower than the median of the others" in why
    assert left == 0
    assert world.scheduler.dispatcher.pool.engines[0].status == "serving"
    assert not world.scheduler.dispatcher.pool.engines[0].is_slow
    assert world.trace == undisturbed


def test_one_that_no_start_mends_is_not_started_for_ever(make_world):
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append(why)
        return endpoint

    def slow(world):
        later(1.0, world.engines[0].change_speed, 0.5)

    settings = {"mode": "async", "max_staleness": 2, "order": "completion", "stall_seconds": 20.0}
    world = make_world(
        engines=4, restart=restart, before_step=once(2, slow), per_step=16, slots=8, train_seconds=20.0, **settings
    ).run(30, num_prompts=600)  # fmt: skip
    assert len(restarts) == 3
    engine = world.scheduler.dispatcher.pool.engines[0]
    assert (engine.status, engine.is_slow, engine.is_leaving) == ("serving", True, False)
    with LedgerReader(world.ledger.file) as reader:
        assert reader.trained_not_once() == []


@pytest.mark.parametrize(("times", "is_slow"), [(6.5, True), (3.5, False)])
def test_one_of_two_engines_is_slow_from_slow_factor_on(make_world, times, is_slow):
    """With itself in the median it would have to be nine times slower than the other, and not five."""

    def slow(world):
        later(1.0, world.engines[0].change_speed, 0.05 * times)

    found = []

    def before(step, world):
        if step == 1:
            slow(world)
            for seconds in range(10, 400, 5):
                later(seconds, lambda: found.append(world.scheduler.dispatcher.pool.engines[0].is_slow))

    settings = {"mode": "async", "max_staleness": 2, "order": "completion", "stall_seconds": 20.0, "slow_factor": 5.0}
    world = make_world(engines=2, before_step=before, per_step=16, slots=8, **settings).run(4, num_prompts=100)
    assert len(found) >= 8
    assert any(found) == is_slow
    counts = world.scheduler.dispatcher.counts
    assert (counts["moved requests"] > 0) == is_slow
    if is_slow:
        assert "times slower than the median of the others" in world.scheduler.dispatcher.pool.engines[0].last_error


def test_moved_responses_are_drawn_anew_where_order_is_fixed(make_world, undisturbed):
    """With the tokens of the slow engine kept, the result would depend on when it was found to be slow."""

    def slow(world):
        later(1.0, world.engines[0].change_speed, 2.0)

    world = make_world(engines=3, before_step=once(2, slow), stall_seconds=8.0).run(STEPS)
    assert world.scheduler.dispatcher.counts["moved requests"] > 0
    assert world.trace == undisturbed


NONSENSE = {
    "too few logprobs": lambda p: replace(p, logprobs=p.logprobs[:-1]),
    "NaN": lambda p: replace(p, logprobs=np.full_like(p.logprobs, np.nan)),
    "positive logprobs": lambda p: replace(p, logprobs=p.logprobs + 3),
    "unknown tokens": lambda p: replace(p, token_ids=p.token_ids + 1000),
    "no versions": lambda p: replace(p, policy_versions=()),
    "future version": lambda p: replace(p, policy_versions=((99, len(p.token_ids)),)),
    "half a response": lambda p: replace(
        p, token_ids=p.token_ids[:1], logprobs=p.logprobs[:1], policy_versions=((p.policy_versions[0][0], 1),)
    ),
    "too long": lambda p: replace(
        p, token_ids=np.tile(p.token_ids, 200), logprobs=np.tile(p.logprobs, 200),
        policy_versions=((p.policy_versions[0][0], 200 * len(p.token_ids)),),
    ),
    "not an answer": lambda p: None,
}  # fmt: skip


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_never_trained_on(make_world, undisturbed, kind):
    """One engine of three answers it from the second step on; a one-token response cannot be told from its half."""

    def corrupt(part):
        return NONSENSE[kind](part) if len(part.token_ids) > 1 else part

    def begin(world):
        world.engines[2].corrupt = corrupt

    world = make_world(engines=3, before_step=once(2, begin)).run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    counts = world.scheduler.dispatcher.counts
    assert counts["failed requests"] > 0
    assert counts["malformed answers"] == (0 if kind == "not an answer" else counts["failed requests"])


def test_an_answer_that_its_reader_refuses_is_malformed_and_asked_for_elsewhere(make_world, undisturbed):
    """SGLang's reader sees NaN first, and the manager counts it as what it finds itself."""

    def begin(world):
        async def nonsense(request, on_tokens=None):
            meta = {"completion_tokens": 1, "output_token_logprobs": [[float("nan"), 5, None]], "finish_reason": None}
            AnswerReader("engine 2", vocab_size=1000, incremental=True).add({"output_ids": [5], "meta_info": meta})

        world.engines[2].generate = nonsense

    world = make_world(engines=3, before_step=once(2, begin)).run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    counts = world.scheduler.dispatcher.counts
    assert counts["malformed answers"] == counts["failed requests"] > 0


@pytest.mark.parametrize("engines", [1, 2])
def test_requests_that_come_back_untouched_unasked_are_failures(make_world, undisturbed, engines):
    """Sent again at once, they would come back for ever. With another engine the run goes on there."""

    def begin(world):
        async def give_back(request, on_tokens=None):
            return GeneratedPart(
                token_ids=np.empty(0, np.int64), logprobs=np.empty(0, np.float32), finish_reason="abort",
                policy_versions=(),
            )  # fmt: skip

        world.engines[0].generate = give_back

    world = make_world(engines=engines, before_step=once(2, begin))
    if engines == 1:
        with pytest.raises(RolloutError, match=r"gave a request back untouched|engines serve, fewer than"):
            world.run(STEPS)
        return
    world.run(STEPS)
    assert world.trace == undisturbed
    assert 0 < world.scheduler.dispatcher.counts["failed requests"] < 100


@pytest.mark.parametrize("use", ["held over a publish", "shared with an evaluation"])
def test_an_engine_that_brings_no_tokens_for_a_reason_is_not_slow(make_world, undisturbed, use):
    """The others are idle, their rates known, and it has brought nothing for several windows."""
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append(why)
        return endpoint

    def begin(world):
        care = world.scheduler.dispatcher.care
        is_shared = use.startswith("shared")
        later(0.5, care.share if is_shared else partial(care.expect_publish, holding=True))
        later(0.6, world.engines[0].change_speed, 1e4)
        later(80.0, world.engines[0].change_speed, 0.05)
        if is_shared:
            later(80.1, care.unshare)

    world = make_world(engines=3, restart=restart, before_step=once(2, begin), stall_seconds=20.0).run(STEPS)
    assert world.scheduler.dispatcher.counts["moved requests"] == 0
    assert restarts == []
    assert world.trace == undisturbed


def test_requests_that_fail_together_are_one_failure_of_the_engine(make_world, undisturbed):
    """As many as the only engine has at a time, by one connection that breaks: it is well, and has failed once."""
    world = make_world(engines=1, before_step=once(2, lambda w: w.engines[0].fail_next(8))).run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    assert world.scheduler.dispatcher.care.lost == 0
    assert world.scheduler.dispatcher.counts["failed requests"] == 8


def test_the_first_group_of_a_step_may_begin_however_many_later_ones_have(make_world):
    """They began in an earlier life, one step off; this one is synchronous, and its first step waits for the first."""
    world = make_world(engines=2, mode="sync", order="fixed")
    ids = world.ledger.reserve(world.prompts(0, 8, 10), num_responses=2)
    begun = Rollout(
        response_ids=np.array([11, 12]), rollout_logprobs=np.full(2, -0.5, np.float32), finish_reason="abort",
        policy_versions=((0, 2),),
    )  # fmt: skip
    for group_id in ids[1:7]:
        world.ledger.save_response(group_id, 0, begun)
    world.run(STEPS)
    trained_once(world)
    assert [key for _, key, _ in world.trace] == [f"{i // 10}/p{i % 10}" for i in range(STEPS * 4)]


def test_a_request_that_an_engine_made_room_for_keeps_its_tokens(make_world):
    """It has no turn again while the engine works for others; when asked, the engine gives back what it has drawn."""
    asked, given = [], []

    def retract(world):
        later(3.0, world.engines[0].retract)
        for engine in world.engines:
            abort = engine.abort

            async def seen(request_id, abort=abort, engine=engine):
                asked.append(request_id)
                run = engine._runs.get(request_id)
                given.append(engine._so_far(run) if run else 0)
                await abort(request_id)

            engine.abort = seen

    settings = {"mode": "async", "partial_rollouts": False, "order": "completion", "stall_seconds": 4.0}
    world = make_world(engines=1, slots=2, per_step=40, before_step=once(1, retract), **settings)
    world.run(1, num_prompts=200)
    counts = world.scheduler.dispatcher.counts
    assert (counts["moved requests"], counts["abandoned requests"], counts["interrupted"]) == (1, 0, 1)
    [number], [name] = given, asked
    assert number >= 10
    [group] = [group for group in world.groups_seen if group.group_id == int(name.split("-")[1])]
    assert len(group.rollouts[int(name.split("-")[2])].response_ids) >= number


def test_lost_requests_are_sent_again(make_world, undisturbed):
    """The engine works on for the others and simply never answers one."""
    world = make_world(engines=2, before_step=once(2, lambda w: w.engines[0].lose_next(1))).run(STEPS)
    assert world.trace == undisturbed
    assert world.scheduler.dispatcher.counts["abandoned requests"] >= 1


def test_no_request_id_is_used_twice(make_world):
    world = make_world(
        engines=2, before_step=once(2, lambda w: (w.engines[0].fail_next(3), later(1, w.engines[1].die)))
    )
    world.run(STEPS)
    seen = [request_id for engine in world.engines for request_id in engine.requests_seen]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("mode", ["sync", "one_step_off", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_random_faults_lose_nothing(make_world, mode, seed):
    """Every few seconds something happens to some engine; the first one is spared."""
    rng = random.Random(seed)

    async def restart(endpoint, why, limit):
        await asyncio.sleep(rng.uniform(0.5, 5.0))
        if rng.random() < 0.3:
            raise OSError("no such host")
        endpoint.revive(world.scheduler.dispatcher.version)
        endpoint.corrupt = None
        return endpoint

    def trouble():
        engine = rng.choice(world.engines[1:])
        action = rng.choice(["die", "hang", "fail", "lose", "slow", "nonsense"])
        if action in ("die", "hang"):
            getattr(engine, action)()
        elif action in ("fail", "lose"):
            getattr(engine, f"{action}_next")(rng.randint(1, 3))
        elif action == "slow":
            engine.change_speed(rng.choice([0.05, 0.2, 5.0]))
        else:
            engine.corrupt = NONSENSE[rng.choice(sorted(NONSENSE))]
        later(rng.uniform(0.2, 4.0), trouble)

    order = rng.choice(["fixed", "completion"])
    world = make_world(engines=4, mode=mode, order=order, max_staleness=2, restart=restart, max_failures=50,
                       before_step=once(1, lambda w: later(0.5, trouble)))  # fmt: skip
    world.run(STEPS)
    trained_once(world)
    assert max(world.staleness_seen) <= world.scheduler.staleness
    assert world.scheduler.dispatcher.counts["failed requests"] > 0


def test_the_loss_of_all_engines_names_them_and_their_last_errors(make_world):
    def all_die(world):
        for number, engine in enumerate(world.engines):
            later(1.0, engine.die, f"host {number} is down")

    world = make_world(engines=3, before_step=once(2, all_die))
    with pytest.raises(RolloutError) as caught:
        world.run(STEPS)
    text = str(caught.value)
    assert text.startswith("0 of 3 engines serve, fewer than scheduling.min_engines = 1, for ")
    for number in range(3):
        assert f"engine {number}: down, " in text
        assert f"host {number} is down" in text or "connection reset" in text
    with LedgerReader(world.ledger.file) as reader:
        assert reader.states()["trained"] == world.per_step


def test_the_run_ends_below_min_engines_and_not_before(make_world):
    def one_dies(world):
        later(1.0, world.engines[0].die)

    make_world(engines=3, min_engines=2, before_step=once(2, one_dies)).run(STEPS)
    with pytest.raises(RolloutError, match=r"2 of 3 engines serve, fewer than scheduling\.min_engines = 3"):
        make_world(engines=3, min_engines=3, before_step=once(2, one_dies), train_seconds=40.0).run(STEPS)


def test_what_a_restart_waits_for_is_not_held_against_the_engine(make_world, undisturbed):
    """Its turn comes after ten times the limit; what is counted is its start, also if it waits in the middle of it."""
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append(why)
        with limit.waiting_for_others():
            await asyncio.sleep(600.0)
        await asyncio.sleep(25.0)
        with limit.waiting_for_others():
            await asyncio.sleep(600.0)
        await asyncio.sleep(25.0)  # 50 s of its own, of 60
        endpoint.revive(world.scheduler.dispatcher.version)
        return endpoint

    world = make_world(
        engines=1, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)), start_seconds=60.0
    )
    world.run(STEPS)
    assert len(restarts) == 1
    trained_once(world)
    assert world.trace == undisturbed


def test_an_engine_that_starts_too_slowly_in_its_turn_is_given_up_and_not_after_the_first_attempt(make_world):
    began, ended = [], []

    async def restart(endpoint, why, limit):
        with limit.waiting_for_others():
            await asyncio.sleep(600.0)
        began.append(asyncio.get_running_loop().time())
        try:
            await asyncio.sleep(1000.0)
        finally:
            ended.append(asyncio.get_running_loop().time())

    world = make_world(
        engines=1, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)), start_seconds=60.0
    )
    text = r"engine 0: given up, restart 3 failed: not ready after 60 s \(scheduling\.start_seconds\)"
    with pytest.raises(RolloutError, match=text):
        world.run(STEPS)
    assert [end - begin for begin, end in zip(began, ended, strict=True)] == pytest.approx([60.0] * 3)


def test_an_engine_of_others_is_never_given_up_while_enough_serve(make_world, undisturbed):
    """It is away for longer than any limit, comes back wrong five times, and then right."""
    tries = []

    async def restart(endpoint, why, limit):
        tries.append(why)
        with limit.absent():
            await asyncio.sleep(0.5)
        if len(tries) < 6:
            raise RolloutError("serves another model")
        endpoint.revive(world.scheduler.dispatcher.version)
        return endpoint

    world = make_world(
        engines=2, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)), start_seconds=60.0,
        stall_seconds=4.0, train_seconds=20.0, outage_seconds=10.0,
    )  # fmt: skip
    world.run(STEPS)
    assert len(tries) == 6
    assert tries[3] == "restart 3 failed: serves another model"
    trained_once(world)
    assert world.trace == undisturbed


@pytest.mark.parametrize("is_of_others", [True, False])
def test_only_an_engine_of_ours_is_given_up_for_leaving_again_and_again(make_world, undisturbed, is_of_others):
    """It comes back right each time, and is lost before it brought a whole response, more often than any limit."""
    tries = []

    async def restart(endpoint, why, limit):
        tries.append(why)
        with limit.absent() if is_of_others else limit.waiting_for_others():
            await asyncio.sleep(0.5)
        endpoint.revive(world.scheduler.dispatcher.version)
        if len(tries) < 6:
            later(0.1, endpoint.die)
        return endpoint

    world = make_world(
        engines=2, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)), stall_seconds=4.0,
        train_seconds=20.0,
    )  # fmt: skip
    world.run(STEPS)
    assert len(tries) == (6 if is_of_others else 3)
    assert world.scheduler.dispatcher.pool.engines[0].status == ("serving" if is_of_others else "given up")
    trained_once(world)
    assert world.trace == undisturbed


def test_an_absent_engine_of_others_is_an_outage(make_world):
    """Nobody here starts it: the run must not wait for it as for a server of its own."""
    began = []

    async def restart(endpoint, why, limit):
        began.append(asyncio.get_running_loop().time())
        with limit.absent():
            await asyncio.sleep(1e6)

    world = make_world(
        engines=1, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)), start_seconds=60.0,
        outage_seconds=300.0,
    )  # fmt: skip
    with pytest.raises(RolloutError, match=r"0 of 1 engines serve.*\n  - engine 0: down, ") as caught:
        world.run(STEPS)
    assert len(began) == 1
    assert 300 <= float(re.search(r"for (\d+) s", str(caught.value)).group(1)) < 360


def test_an_engine_that_cannot_be_restarted_is_given_up(make_world):
    async def restart(endpoint, why, limit):
        raise OSError("out of GPU memory")

    world = make_world(engines=1, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)))
    with pytest.raises(RolloutError, match=r"engine 0: given up, restart 3 failed: out of GPU memory"):
        world.run(STEPS)


def test_the_account_tells_what_a_server_died_of_that_starts_well_and_dies_at_its_first_batch(make_world):
    words = "ended with status 134; the end of logs/engine_0.log:\nCUDA error: illegal access"
    starts = []

    async def restart(endpoint, why, limit):
        starts.append(why)
        limit.tell_end(words)
        endpoint.revive(world.scheduler.dispatcher.version)
        later(1e-6, endpoint.die)
        return endpoint

    world = make_world(engines=1, restart=restart, before_step=once(2, lambda w: later(1.0, w.engines[0].die)))
    with pytest.raises(RolloutError) as caught:
        world.run(STEPS)
    assert len(starts) == 3
    assert re.search(rf"engine 0: given up, .*; before that its server {re.escape(words)}", str(caught.value))


def test_a_request_that_fails_everywhere_ends_the_run_by_its_prompt(make_world):
    def poison(world):
        for engine in world.engines:
            real = engine.generate

            async def refusing(request, on_tokens=None, real=real, engine=engine):
                if len(request.token_ids) == 3 + 5:  # prompt p5
                    raise EndpointError(f"{engine.name}: answered 500", retry=True)
                return await real(request, on_tokens)

            engine.generate = refusing

    world = make_world(engines=3, max_failures=4, before_step=once(1, poison))
    with pytest.raises(RolloutError, match=r"prompt p5, response \d: 4 requests failed .*answered 500"):
        world.run(STEPS)


def test_what_would_fail_alike_elsewhere_is_not_tried_elsewhere(make_world):
    def refuse(world):
        async def refusing(request, on_tokens=None):
            calls.append(1)
            raise EndpointError("engine 0: the model has another vocabulary", retry=False)

        for engine in world.engines:
            engine.generate = refusing

    calls: list[int] = []
    world = make_world(engines=2, per_step=1, in_flight=1, before_step=once(1, refuse))
    with pytest.raises(RolloutError, match=r"prompt p0 cannot be answered: .*another vocabulary"):
        world.run(STEPS)
    assert len(calls) <= 2


def test_a_grader_that_breaks_ends_the_run_with_its_words(make_world, monkeypatch):
    world = make_world(before_step=once(2, lambda w: setattr(w.scheduler._grading, "_grade", lambda groups: 1 / 0)))
    with pytest.raises(RolloutError, match="grading failed: ZeroDivisionError"):
        world.run(STEPS)


def test_a_full_disk_ends_the_run_and_the_next_life_goes_on_from_there(make_world, undisturbed):
    def fill(world):
        pages = world.ledger.connection.execute("PRAGMA page_count").fetchone()[0]
        world.ledger.connection.execute(f"PRAGMA max_page_count = {pages}")

    world = make_world(engines=3, before_step=once(3, fill))
    with pytest.raises(RolloutError, match=r"the ledger cannot grow .*Free disk space and start again"):
        world.run(STEPS)
    world.ledger.connection.execute("PRAGMA max_page_count = 1000000")
    again = make_world(engines=3, ledger=world.ledger, done_steps=world.done_steps, trace=world.trace)
    for engine in again.engines:
        engine.version = world.done_steps
    again.run(STEPS)
    trained_once(again)
    assert again.trace == undisturbed


def test_an_answer_that_comes_after_all_is_ignored(make_world, undisturbed):
    """A client that cannot be cancelled brings the answer of a hung engine when others have given theirs."""

    def stubborn(world):
        engine = world.engines[1]
        real = engine.generate

        async def late(request, on_tokens=None):
            work = asyncio.ensure_future(real(request, on_tokens))
            while True:
                try:
                    part = await asyncio.shield(work)
                    await asyncio.sleep(45.0)
                    return part
                except asyncio.CancelledError:
                    continue

        engine.generate = late

    world = make_world(engines=2, before_step=once(2, stubborn), train_seconds=50.0).run(STEPS)
    assert world.scheduler.dispatcher.care.lost >= 1
    trained_once(world)
    assert world.trace == undisturbed


def test_an_engine_that_missed_a_publish_is_started_anew(make_world, undisturbed):
    told = []

    async def restart(endpoint, why, limit):
        told.append(why)
        del endpoint.stuck
        return endpoint

    def miss(world):
        engine = world.engines[1]
        engine.stuck = True
        real = engine.check

        async def check():
            return 1 if hasattr(engine, "stuck") else await real()

        engine.check = check

    world = make_world(engines=2, restart=restart, before_step=once(2, miss)).run(STEPS)
    assert told == ["has weights of version 1 after version 2 was published"]
    assert world.trace == undisturbed


def test_an_engine_restarted_during_a_long_publish_is_judged_after_it(make_world, undisturbed):
    """It comes back in the midst of it, when the weights that the manager takes for current are on their way out."""
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append(why)
        await asyncio.sleep(20.0)  # the step is over by then, and the publish under way
        endpoint.revive(-1)
        return endpoint

    def die_while_training(world):
        later(1.0, world.engines[1].die)

    world = make_world(engines=2, restart=restart, before_step=once(2, die_while_training), publish_seconds=100.0)
    world.run(STEPS)
    assert len(restarts) == 1
    assert world.scheduler.dispatcher.pool.engines[1].status == "serving"
    assert world.trace == undisturbed


def test_an_idle_engine_that_dies_is_started_anew_before_it_is_needed(make_world, undisturbed):
    """Nothing is in flight while the only engine dies: synchronous, and the step trains for long."""
    restarts = []

    async def restart(endpoint, why, limit):
        restarts.append((asyncio.get_running_loop().time(), why))
        endpoint.revive(1)
        return endpoint

    died = []

    def die_while_training(world):
        engine = world.engines[0]

        def die():
            assert world.scheduler.dispatcher.num_flying == 0
            died.append(asyncio.get_running_loop().time())
            engine.die()

        later(500.0, die)

    world = make_world(
        engines=1, mode="sync", restart=restart, before_step=once(2, die_while_training), train_seconds=1000.0
    ).run(STEPS)
    [(when, why)] = restarts
    assert "does not answer, idle" in why
    assert when - died[0] <= 2 * world.scheduler.dispatcher.care.tick_seconds + 1.0
    trained_once(world)


@pytest.mark.parametrize("shared", [True, False])
def test_an_engine_that_serves_others_first_is_not_given_up_for_its_silence(make_world, undisturbed, shared):
    """An evaluation takes all of its slots for longer than `scheduling.stall_seconds`."""

    def evaluate(world):
        care = world.scheduler.dispatcher.care

        def begin():
            if shared:
                care.share()
            world.engines[0].serves_others = True
            world.engines[0].hang()

        def end():
            world.engines[0]._is_hung = False
            world.engines[0].change_speed(0.05)
            world.engines[0]._fill()
            if shared:
                care.unshare()

        later(1.0, begin)
        later(46.0, end)

    world = make_world(engines=1, outage_seconds=600.0, before_step=once(2, evaluate)).run(STEPS)
    trained_once(world)
    assert world.trace == undisturbed
    assert world.scheduler.dispatcher.care.lost == (0 if shared else 1)


def test_silence_counts_anew_after_an_evaluation(make_world):
    def hang_after(world):
        care = world.scheduler.dispatcher.care
        care.share()
        world.engines[0].serves_others = True
        later(1.0, world.engines[0].hang)
        later(100.0, care.unshare)

    lost_at = {}

    def note(seconds):
        lost_at[seconds] = world.scheduler.dispatcher.care.lost

    def before(step, world):
        if step == 2:
            hang_after(world)
            for seconds in (99.0, 115.0, 135.0):
                later(seconds, note, seconds)

    world = make_world(engines=1, outage_seconds=60.0, before_step=before)
    with pytest.raises(RolloutError, match="brought no token for 2"):
        world.run(STEPS)
    assert lost_at == {99.0: 0, 115.0: 0, 135.0: 1}


@pytest.mark.parametrize("busy", [True, False])
def test_an_engine_that_brings_nobody_a_token_while_others_use_it_is_started_anew(make_world, undisturbed, busy):
    """Its health check answers all the while; `busy`: we have requests at it, too, and not the others alone."""
    lost_at = []

    async def restart(endpoint, why, limit):
        lost_at.append((asyncio.get_running_loop().time(), why))
        endpoint.revive(world.scheduler.dispatcher.version)
        return endpoint

    def evaluate(current):
        engine, care = current.engines[0], current.scheduler.dispatcher.care
        engine.check = lambda: asyncio.sleep(0, engine.version)
        later(1.0, care.share)
        later(2.0, engine.hang)
        hung_at.append(asyncio.get_running_loop().time() + 2.0)

    hung_at: list[float] = []
    # Asked for between two steps, when nothing is in flight, or in the middle of one.
    when = {"before_step": once(2, evaluate)} if busy else {"train_seconds": 60.0, "before_step": once(3, evaluate)}
    world = make_world(engines=1, mode="sync", outage_seconds=600.0, restart=restart, **when)
    world.run(STEPS)
    [(when_lost, why)] = lost_at
    assert "brought no token to anybody for 2" in why
    assert 20.0 <= when_lost - hung_at[0] <= 20.0 + 2 * world.scheduler.dispatcher.care.tick_seconds
    trained_once(world)


def test_silence_from_before_others_came_is_not_counted(make_world, undisturbed):
    """Responses that a publish held brought none in it."""

    def share(world):
        world.engines[0].silence = lambda: Silence(seconds=asyncio.get_running_loop().time(), is_first=False)
        care = world.scheduler.dispatcher.care
        for begins in (0.0, 30.0, 60.0):
            later(begins, care.share)
            later(begins + 15.0, care.unshare)

    world = make_world(engines=1, outage_seconds=600.0, before_step=once(3, share)).run(STEPS)
    assert world.scheduler.dispatcher.care.lost == 0
    trained_once(world)
