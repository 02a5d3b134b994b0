"""Requests over several endpoints: balance, groups by key, retries, and parts put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt, Rollout, RolloutGroup
from megatron_klear.rollout import RolloutProgress, SamplingParams
from megatron_klear.rollout.endpoint import EndpointError, GeneratedPart, GenerationRequest, Silence, TokensCallback
from megatron_klear.rollout.sglang import EndpointPool, engine
from megatron_klear.rollout.sglang.engine import response_seed

LIMIT = 6


@dataclass
class Fake:
    """An endpoint that answers a prompt's first token, over and over; or what `script` says, request by request."""

    name: str
    script: list[Callable[[GenerationRequest], GeneratedPart]] = field(default_factory=list)
    seen: list[GenerationRequest] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0

    async def generate(self, request: GenerationRequest, on_tokens: TokensCallback | None = None) -> GeneratedPart:
        self.seen.append(request)
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            await asyncio.sleep(0.01 * (1 + len(self.seen) % 3))  # answers come back out of order
            made = self.script.pop(0)(request) if self.script else whole(request)
            if on_tokens is not None:
                on_tokens(len(made.token_ids))
            return made
        finally:
            self.busy -= 1

    async def abort(self, request_id: str) -> None: ...

    async def check(self) -> int:
        return 0

    def silence(self) -> Silence:
        return Silence(seconds=0.0, is_first=False)

    async def close(self) -> None: ...


def part(tokens: list[int], reason: str, version: int) -> GeneratedPart:
    return GeneratedPart(
        token_ids=np.array(tokens, np.int64),
        logprobs=np.full(len(tokens), -float(version), np.float32),
        finish_reason=reason,  # type: ignore[arg-type]
        policy_versions=((version, len(tokens)),) if tokens else (),
    )


def whole(request: GenerationRequest) -> GeneratedPart:
    return part([int(request.token_ids[0])] * request.max_new_tokens, "length", 1)


def fail(retry: bool = True, hangs: bool = False) -> Callable[[GenerationRequest], GeneratedPart]:
    def raising(request: GenerationRequest) -> GeneratedPart:
        raise EndpointError(f"{request.request_id} failed", retry=retry, hangs=hangs)

    return raising


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{i}", domain="math", token_ids=np.array([i, 9]), reference="") for i in range(count)]


def run(
    endpoints: list[Fake],
    count: int = 1,
    *,
    failures: int | None = None,
    responses: int = 1,
    in_flight: int = 4,
    retries: int = 2,
    progress: list[RolloutProgress] | None = None,
    version: int | None = None,
    is_in_use: Callable[[int], bool] = lambda place: True,
    finished: dict[tuple[str, int], Rollout] | None = None,
    waits_for_hanging: bool = True,
    hanging: set[int] | None = None,
) -> list[RolloutGroup]:
    async def generate() -> list[RolloutGroup]:
        pool = EndpointPool(endpoints, in_flight=in_flight, retries=retries)
        pool.hanging = pool.hanging if hanging is None else hanging
        pool.version, pool.is_in_use = version, is_in_use
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=LIMIT, stop_token_ids=())
        callback = None if progress is None else progress.append
        groups = await pool.generate(
            prompts(count), num_responses=responses, sampling=sampling, seed=4, on_progress=callback, finished=finished,
            waits_for_hanging=waits_for_hanging,
        )  # fmt: skip
        assert pool._outstanding == [0] * len(endpoints)
        assert failures is None or pool.failures == failures
        return groups

    return asyncio.run(generate())


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_RETRY_PAUSE_SECONDS", 0.0)


def test_groups_are_whole_in_order_and_each_on_one_server() -> None:
    endpoints = [Fake("a"), Fake("b"), Fake("c")]
    groups = run(endpoints, 10, responses=3)
    assert [g.prompt.prompt_id for g in groups] == [f"p{i}" for i in range(10)]
    for number, group in enumerate(groups):
        assert [r.response_ids.tolist() for r in group.rollouts] == [[number] * LIMIT] * 3
        assert {r.policy_versions for r in group.rollouts} == {((1, LIMIT),)}
    places = [{int(r.token_ids[0]) for r in e.seen} for e in endpoints]
    assert sorted(map(len, places)) == [3, 3, 4]
    assert not places[0] & places[1] | places[1] & places[2]


def test_what_is_finished_outlives_a_failure_of_others() -> None:
    """The second call draws what is missing, of whole groups and of a group in part, and counts the rest as done."""
    finished: dict[tuple[str, int], Rollout] = {}

    def lost(request: GenerationRequest) -> GeneratedPart:
        return whole(request) if len(server.seen) <= 5 else fail(retry=True)(request)

    server = Fake("a", [lost] * 20)
    with pytest.raises(EndpointError):
        run([server], 3, responses=3, in_flight=1, retries=0, finished=finished)
    assert len(finished) == 5
    kept, again, progress = dict(finished), Fake("b"), list[RolloutProgress]()
    groups = run([again], 3, responses=3, progress=progress, finished=finished)
    assert len(again.seen) == 4
    drawn = [rollout for group in groups for rollout in group.rollouts]
    assert [r.response_ids.tolist() for r in drawn] == [[n] * LIMIT for n in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert all(finished[key] is rollout for key, rollout in kept.items())
    assert min(p.finished_responses for p in progress) >= 5
    assert (progress[-1].finished_responses, progress[-1].generated_tokens) == (9, 9 * LIMIT)


def test_a_server_that_hangs_is_left_to_whoever_starts_it_anew() -> None:
    """Where all of them hang, nothing is asked again; where one works, it gets all that waited at the other."""
    hanging: set[int] = set()
    alone = Fake("a", [fail(hangs=True)] * 20)
    with pytest.raises(EndpointError, match="failed"):
        run([alone], 4, in_flight=1, waits_for_hanging=False, hanging=hanging)
    assert len(alone.seen) <= 2, "the next one may have begun, and nobody waited for it"
    assert hanging == {0}

    a, b = Fake("a", [fail(hangs=True)] * 20), Fake("b")
    run([a, b], 8, in_flight=1, waits_for_hanging=False, failures=1, hanging=hanging)
    assert (len(a.seen), len(b.seen), hanging) == (1, 8, {0})

    both = [Fake("a", [fail(hangs=True)] * 20), Fake("b", [fail(hangs=True)] * 20)]
    with pytest.raises(EndpointError, match="failed"):
        run(both, 8, in_flight=1, waits_for_hanging=False, hanging=hanging)
    assert all(len(e.seen) <= 2 for e in both)
    assert hanging == {0, 1}


def test_a_server_that_hung_and_works_again_is_used() -> None:
    hanging = {0}
    passing = Fake("a", [fail(hangs=True)])
    run([passing], 3, in_flight=1, failures=1, hanging=hanging)
    assert (len(passing.seen), hanging) == (4, set())


def test_a_server_that_is_not_in_use_is_asked_for_nothing() -> None:
    endpoints = [Fake("a"), Fake("b"), Fake("c")]
    used = [True, False, True]
    run(endpoints, 6, is_in_use=used.__getitem__)
    assert [len(e.seen) for e in endpoints] == [3, 0, 3]

    def losing(request: GenerationRequest) -> GeneratedPart:
        used[0] = False
        return fail()(request)

    endpoints = [Fake("a", [losing]), Fake("b"), Fake("c")]
    run(endpoints, 1, is_in_use=used.__getitem__, failures=1)
    assert [len(e.seen) for e in endpoints] == [1, 0, 1], "nor when a request moves to another one"


def test_with_no_server_in_use_it_is_said_at_once_and_may_pass() -> None:
    endpoints = [Fake("a"), Fake("b")]
    with pytest.raises(EndpointError, match="none of the 2 engines gets the weights that are published") as error:
        run(endpoints, 2, is_in_use=lambda place: False)
    assert error.value.retry
    assert [e.seen for e in endpoints] == [[], []]


def test_no_server_has_more_than_its_share_in_flight() -> None:
    endpoints = [Fake("a"), Fake("b")]
    run(endpoints, 12, responses=2, in_flight=3)
    assert [e.most_busy for e in endpoints] == [3, 3]


def test_a_failed_request_goes_to_the_other_server_under_a_new_name() -> None:
    endpoints = [Fake("a", script=[fail()]), Fake("b")]
    (group,) = run(endpoints, failures=1)
    assert group.rollouts[0].response_ids.tolist() == [0] * LIMIT
    first, second = endpoints[0].seen[0], endpoints[1].seen[0]
    assert first.request_id != second.request_id
    assert first.seed == second.seed
    assert first.token_ids.tolist() == second.token_ids.tolist()


def test_two_dead_servers_do_not_draw_all_tries_from_one_that_lives() -> None:
    """They fail at once and so have the fewest outstanding."""
    dead = [Fake(name, script=[fail() for _ in range(200)]) for name in "ab"]
    living = Fake("c")
    groups = run([dead[0], living, dead[1]], 12, responses=4, retries=2)
    assert all(len(g.rollouts[i].response_ids) == LIMIT for g in groups for i in range(4))
    assert len(living.seen) == 48


def test_a_request_that_keeps_failing_is_an_error() -> None:
    endpoint = Fake("a", script=[fail()] * 3)
    with pytest.raises(EndpointError, match="failed"):
        run([endpoint], retries=2)
    assert len(endpoint.seen) == 3


def test_what_would_fail_alike_is_not_asked_again() -> None:
    endpoint = Fake("a", script=[fail(retry=False)])
    with pytest.raises(EndpointError):
        run([endpoint])
    assert len(endpoint.seen) == 1


def test_an_interrupted_response_is_continued_with_what_is_left_of_its_budget() -> None:
    endpoint = Fake("a", script=[lambda r: part([5, 6], "abort", 1), lambda r: part([7], "abort", 2)])
    (group,) = run([endpoint], failures=0)
    rollout = group.rollouts[0]
    assert rollout.response_ids.tolist() == [5, 6, 7, 0, 0, 0]
    assert rollout.rollout_logprobs.tolist() == [-1, -1, -2, -1, -1, -1]
    assert rollout.policy_versions == ((1, 2), (2, 1), (1, 3))
    assert rollout.finish_reason == "length"
    assert [r.token_ids.tolist() for r in endpoint.seen] == [[0, 9], [0, 9, 5, 6], [0, 9, 5, 6, 7]]
    assert [r.max_new_tokens for r in endpoint.seen] == [6, 4, 3]
    assert len({r.seed for r in endpoint.seen}) == 1


def test_a_response_interrupted_at_its_last_token_has_reached_its_length() -> None:
    (group,) = run([Fake("a", script=[lambda r: part([5] * LIMIT, "abort", 1)])])
    assert group.rollouts[0].finish_reason == "length"


def test_a_request_that_comes_back_untouched_again_and_again_is_an_error() -> None:
    endpoint = Fake("a", script=[lambda r: part([], "abort", 1)] * 10)
    with pytest.raises(EndpointError, match=r"gave request .* back untouched"):
        run([endpoint], retries=3)
    assert len(endpoint.seen) == 4


def test_progress_ends_with_everything_done() -> None:
    progress: list[RolloutProgress] = []
    run([Fake("a", script=[fail()]), Fake("b")], 4, responses=2, progress=progress)
    last = progress[-1]
    assert (last.finished_responses, last.total_responses, last.generated_tokens) == (8, 8, 8 * LIMIT)


def test_requests_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(RolloutError, match="no engine to generate with"):
        run([])
    with pytest.raises(RolloutError, match="num_responses is 0"):
        run([Fake("a")], responses=0)


def test_seeds_differ_by_everything_that_names_a_response() -> None:
    seeds = {response_seed(s, p, i) for s in (1, 2) for p in ("p1", "p11") for i in (0, 1, 11)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(1, "p1", 0) == response_seed(1, "p1", 0)


def test_tokens_of_weights_that_are_not_the_published_ones_are_drawn_again() -> None:
    old = [lambda request: part([7] * LIMIT, "length", 4)]
    endpoints = [Fake("a", script=list(old)), Fake("b", script=[lambda request: part([5] * LIMIT, "length", 5)])]
    (group,) = run(endpoints, version=5)
    assert group.rollouts[0].response_ids.tolist() == [5] * LIMIT
    assert group.rollouts[0].policy_versions == ((5, LIMIT),)
    with pytest.raises(EndpointError, match=r"a: its versions \(\(4, 6\),\) are not from 5 to 5, which were in use"):
        run([Fake("a", script=old * 3)], version=5)


@pytest.mark.parametrize(
    "unsound",
    [
        part([3] * (LIMIT + 1), "length", 1),
        part([3], "stop", 1),
        part([3], "length", 1),
        replace(part([3] * LIMIT, "length", 1), policy_versions=((2, LIMIT - 1), (1, 1))),
        replace(part([3] * LIMIT, "length", 1), logprobs=np.full(LIMIT, 0.5, np.float32)),
    ],
    ids=["too long", "no stop token", "half a response", "versions that go down", "no logprobs"],
)
def test_an_answer_that_cannot_be_right_is_asked_for_elsewhere_and_counted(unsound: GeneratedPart) -> None:
    async def ask() -> tuple[list[RolloutGroup], int, int]:
        pool = EndpointPool([Fake("a", [lambda request: unsound]), Fake("b")], in_flight=4, retries=1)
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=LIMIT, stop_token_ids=(7,))
        groups = await pool.generate(prompts(1), num_responses=1, sampling=sampling, seed=4)
        return groups, pool.failures, pool.malformed

    (group,), failures, malformed = asyncio.run(ask())
    assert group.rollouts[0].response_ids.tolist() == [0] * LIMIT
    assert (failures, malformed) == (1, 1)
