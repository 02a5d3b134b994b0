"""What an endpoint makes of a server's answers, good and bad."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_klear.errors import RolloutError
from megatron_klear.records import Prompt
from megatron_klear.rollout.endpoint import EndpointError, GeneratedPart, GenerationRequest, Silence
from megatron_klear.rollout.sglang import Connection, EndpointPool, SglangEndpoint, endpoint, engine
from megatron_klear.rollout.sglang import progress as progress_module
from megatron_klear.rollout.sglang.progress import Progress
from tests.rollout.sglang.conftest import StandIn, chunk, standing_in

STOP = {"type": "stop", "matched": 7}
ABORT = {"type": "abort", "message": "Aborted", "status_code": None}

Request = Callable[..., GenerationRequest]


def generate(
    url: str, request: GenerationRequest, *, incremental: bool = True, idle: float = 30.0, on_tokens: Any = None
) -> GeneratedPart:
    async def run() -> GeneratedPart:
        endpoint = SglangEndpoint(
            Connection("engine 0", url), vocab_size=83, context_length=128, incremental=incremental, idle_seconds=idle
        )
        try:
            return await endpoint.generate(request, on_tokens)
        finally:
            await endpoint.close()

    return asyncio.run(run())


def answer_with(stand_in: StandIn, *events: Any, **options: Any) -> None:
    stand_in.answers["/generate"] = lambda handler, body: handler.events(*events, **options)


def test_a_response_arrives_in_parts(stand_in: StandIn, make_request: Request) -> None:
    spans = [{"version": "2", "start": 0, "end": 3}, {"version": "3", "start": 3, "end": 4}]
    answer_with(stand_in, chunk([5], 1), chunk([6, 9], 3), chunk([7], 4, finish=STOP, weight_versions=spans))
    counts: list[int] = []
    part = generate(stand_in.url, make_request(stops=(7,)), on_tokens=counts.append)
    assert part.token_ids.tolist() == [5, 6, 9, 7]
    assert part.logprobs.dtype == np.float32
    assert part.logprobs.tolist() == [-0.5] * 4
    assert part.finish_reason == "stop"
    assert part.policy_versions == ((2, 3), (3, 1))
    assert counts == [1, 3, 4]
    body = dict(stand_in.seen)["/generate"]
    assert body["input_ids"] == [1, 2, 3]
    assert body["sampling_params"]["temperature"] == 0.7
    assert body["sampling_params"]["top_p"] == 0.9
    assert body["sampling_params"]["stop_token_ids"] == [7]
    assert body["sampling_params"]["max_new_tokens"] == 8
    assert "/abort_request" not in stand_in.paths()


def test_a_server_that_repeats_all_tokens_gives_the_same(stand_in: StandIn, make_request: Request) -> None:
    answer_with(stand_in, chunk([5], 1), chunk([5, 6, 9], 3), chunk([5, 6, 9, 7], 4, finish=STOP))
    part = generate(stand_in.url, make_request(), incremental=False)
    assert part.token_ids.tolist() == [5, 6, 9, 7]
    assert part.policy_versions == ((3, 4),)


def test_prefixes_are_shared_within_a_version_of_this_life_only(
    stand_in: StandIn, make_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that outlives the trainer sees the versions after the checkpoint again, for other weights."""

    def key(version: int) -> str:
        async def run() -> None:
            server = SglangEndpoint(
                Connection("engine 0", stand_in.url), vocab_size=83, context_length=128, incremental=True
            )
            server.use_version(version)
            await server.generate(make_request(stops=(7,)))
            await server.close()

        asyncio.run(run())
        return str(stand_in.seen[-1][1]["extra_key"])

    answer_with(stand_in, chunk([7], 1, finish=STOP))
    first = [key(3), key(3), key(4)]
    monkeypatch.setattr(endpoint, "_LIFE", "another")
    assert first[0] == first[1]
    assert len({*first, key(3)}) == 3


def test_an_interrupted_request_returns_its_part(stand_in: StandIn, make_request: Request) -> None:
    answer_with(stand_in, chunk([5, 6], 2), chunk([9], 3, finish=ABORT))
    part = generate(stand_in.url, make_request())
    assert (part.token_ids.tolist(), part.finish_reason) == ([5, 6, 9], "abort")


def test_a_request_interrupted_while_it_waits_repeats_its_last_token(stand_in: StandIn, make_request: Request) -> None:
    echo = chunk([6], 2, finish=ABORT, output_token_logprobs=[[-0.5, 5, None], [-0.5, 6, None]])
    echo["meta_info"]["weight_versions"] = [{"version": "3", "start": 0, "end": 5}]  # three more were never sent
    answer_with(stand_in, chunk([5, 6], 2), echo)
    part = generate(stand_in.url, make_request())
    assert part.token_ids.tolist() == [5, 6]
    assert part.policy_versions == ((3, 2),)


def test_a_request_interrupted_before_its_first_token_is_empty(stand_in: StandIn, make_request: Request) -> None:
    answer_with(stand_in, chunk([], 0, finish=ABORT, weight_versions=[]))
    part = generate(stand_in.url, make_request())
    assert (len(part.token_ids), part.policy_versions, part.finish_reason) == (0, (), "abort")


FAULTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool, str]] = {
    "no JSON": (("{half",), {}, True, "no JSON: {half"),
    "no object": (("[1]",), {}, True, "expected an object"),
    "fields missing": (({"output_ids": [1]},), {}, True, "malformed answer to /generate: KeyError: 'meta_info'"),
    "no logprobs": ((chunk([5], 1, output_token_logprobs=[]),), {}, True, "0 logprobs for 1 new tokens"),
    "other tokens": ((chunk([5], 1, output_token_logprobs=[[-1, 6, None]]),), {}, True, "not the tokens"),
    "fewer tokens": ((chunk([5, 6], 2), chunk([], 1)), {}, True, "1 tokens after 2"),
    "unknown token": ((chunk([83], 1),), {}, True, "token 83 is outside the vocabulary of 83"),
    "nan": (
        (chunk([5], 1, output_token_logprobs=[[float("nan"), 5, None]]),), {}, True,
        "malformed answer to /generate: token 5 has the log-probability nan",
    ),
    "a probability above 1": (
        (chunk([5], 1, output_token_logprobs=[[0.5, 5, None]]),), {}, True,
        "malformed answer to /generate: token 5 has the log-probability 0.5. Where a single engine says so, start that "
        "one anew; where all do, the weights have diverged: lower optimizer.lr",
    ),
    "a probability of 0": (
        (chunk([5], 1, output_token_logprobs=[[float("-inf"), 5, None]]),), {}, True, "the log-probability -inf",
    ),
    "no float32": (
        (chunk([5], 1, output_token_logprobs=[[-1e300, 5, None]]),), {}, True, "the log-probability -1e+300",
    ),
    "endless": (
        (chunk([5], 1, completion_tokens=float("inf")),), {}, True, "malformed answer to /generate: OverflowError",
    ),
    "no number": (
        (chunk([5], 1, output_token_logprobs=[[-(10**400), 5, None]]),), {}, True,
        "malformed answer to /generate: OverflowError",
    ),
    "endless versions": (
        (chunk([5], 1, finish=STOP, weight_versions=[{"version": "3", "start": 0, "end": float("inf")}]),), {}, True,
        "malformed answer to /generate: weight_versions: cannot convert float infinity",
    ),
    "half a response": ((chunk([5], 1),), {"done": False}, True, "broken off"),
    "no end": ((chunk([5], 1),), {}, True, r"half a response (1 tokens, no end)"),
    "unknown end": ((chunk([5], 1, finish={"type": "tired"}),), {}, True, "finish_reason {'type': 'tired'}"),
    "error event": (({"error": {"message": "out of memory"}},), {}, True, "out of memory"),
    "given up": ((chunk([5], 1, finish=ABORT | {"status_code": 500}),), {}, True, "gave a request up: Aborted (500)"),
    "a hole in versions": (
        (chunk([5, 6], 2, finish=STOP, weight_versions=[{"version": "3", "start": 1, "end": 2}]),), {}, True,
        "a span starts at 1",
    ),
    "versions too short": (
        (chunk([5, 6], 2, finish=STOP, weight_versions=[{"version": "3", "start": 0, "end": 1}]),), {}, True,
        "weight_versions cover 1 of 2 tokens",
    ),
    "cut short": ((chunk([5], 1, finish={"type": "length"}),), {}, False, "at 1 of 8 tokens; its context or KV cache"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_answer_is_an_error_that_says_whether_to_retry(
    fault: str, stand_in: StandIn, make_request: Request
) -> None:
    events, options, retry, text = FAULTS[fault]
    answer_with(stand_in, *events, **options)
    with pytest.raises(EndpointError) as error:
        generate(stand_in.url, make_request())
    assert text in str(error.value)
    assert str(error.value).startswith("engine 0: ")
    assert error.value.retry is retry
    assert error.value.malformed == ("malformed answer" in str(error.value) or fault in ("no JSON", "no object"))


@pytest.mark.parametrize("logprob", [float("nan"), 0.5])
def test_what_cannot_be_a_logprob_is_asked_for_elsewhere_and_not_for_ever(
    logprob: float, make_request: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server of two says it; then both do."""
    monkeypatch.setattr(engine, "_RETRY_PAUSE_SECONDS", 0.0)
    wrong = chunk([7], 1, finish=STOP, output_token_logprobs=[[logprob, 7, None]])

    async def ask(urls: list[str]) -> tuple[Any, int]:
        options: dict[str, Any] = {"vocab_size": 83, "context_length": 128, "incremental": True}
        ways = [SglangEndpoint(Connection(f"engine {i}", url), **options) for i, url in enumerate(urls)]
        pool = EndpointPool(ways, in_flight=1, retries=3)
        prompt = Prompt(prompt_id="p", domain="math", token_ids=np.arange(3), reference="")
        sampling = make_request(stops=(7,)).sampling
        try:
            answer = await pool.generate([prompt], num_responses=1, sampling=sampling, seed=1)
        except EndpointError as error:
            return error, pool.failures
        finally:
            await asyncio.gather(*(way.close() for way in ways))
        return answer[0].rollouts[0], pool.failures

    with standing_in() as broken, standing_in() as sound:
        answer_with(broken, wrong)
        answer_with(sound, chunk([7], 1, finish=STOP))
        rollout, failures = asyncio.run(ask([broken.url, sound.url]))
        assert (rollout.response_ids.tolist(), rollout.rollout_logprobs.tolist(), failures) == ([7], [-0.5], 1)
        answer_with(sound, wrong)
        error, failures = asyncio.run(ask([broken.url, sound.url]))
        assert "optimizer.lr" in str(error)
        assert failures == 4


@pytest.mark.parametrize(("status", "retry"), [(503, True), (500, True), (429, True), (404, True)])
def test_a_status_that_may_pass_is_retried(status: int, retry: bool, stand_in: StandIn, make_request: Request) -> None:
    stand_in.answers["/generate"] = lambda handler, body: handler.reply(status, "busy")
    with pytest.raises(EndpointError, match=rf"status {status}: busy") as error:
        generate(stand_in.url, make_request())
    assert error.value.retry is retry


@pytest.mark.parametrize("how", ["status", "event", "end"])
def test_a_refused_request_is_wrong_everywhere(how: str, stand_in: StandIn, make_request: Request) -> None:
    """A server says so before its stream, in it (what its tokenizer manager finds), or as the end of it."""
    if how == "status":
        stand_in.answers["/generate"] = lambda handler, body: handler.reply(400, {"error": {"message": "too long"}})
    elif how == "event":
        answer_with(stand_in, {"error": {"message": "too long", "code": 400, "retryable": False}})
    else:
        answer_with(stand_in, chunk([], 0, finish={"type": "abort", "message": "too long", "status_code": 400}))
    with pytest.raises(RolloutError, match=r"refuses request r1 of 3 tokens: too long\. .*look at") as error:
        generate(stand_in.url, make_request())
    for setting in ("sglang.max_total_tokens", "data.max_prompt_tokens", "rollout.max_response_tokens"):
        assert setting in str(error.value)
    assert not isinstance(error.value, EndpointError)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ids": [1, 83]}, r"token ids from 1 to 83, outside the vocabulary of 83 \(tokenizer.dir"),
        ({"ids": [-1, 2]}, "token ids from -1 to 2"),
        ({"ids": []}, "it has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"ids": [1] * 120}, "120 tokens, 8 more and a margin of 8 exceed the engine's context of 128"),
        ({"stops": (99,)}, r"stop tokens \[99\] are outside the vocabulary of 83 \(rollout.stop_tokens\)"),
    ],
)
def test_a_wrong_request_is_never_sent(
    changes: dict[str, Any], text: str, stand_in: StandIn, make_request: Request
) -> None:
    with pytest.raises(RolloutError, match=text):
        generate(stand_in.url, make_request(**changes))
    assert stand_in.seen == []


def test_no_server_is_an_error_to_retry(make_request: Request) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(EndpointError, match="no connection") as error:
            generate(url, make_request())
    assert error.value.retry


def test_a_stalled_response_is_given_up_and_dropped_at_the_server(stand_in: StandIn, make_request: Request) -> None:
    released = threading.Event()

    def stall(handler: Any, body: dict[str, Any]) -> None:
        handler.events(chunk([5], 1), pause=0.0, done=False) if released.wait(20) else None

    stand_in.answers["/generate"] = stall
    start = time.monotonic()
    with pytest.raises(
        EndpointError, match=r"no new token of request r1 for 0.5 s or more \(sglang.idle_seconds\)"
    ) as error:
        generate(stand_in.url, make_request(), idle=0.5)
    released.set()
    assert error.value.retry
    assert error.value.hangs
    assert time.monotonic() - start < 10
    assert ("/abort_request", {"rid": "r1"}) in stand_in.seen


def test_a_response_that_waits_for_its_turn_is_not_given_up_while_the_server_works_for_others(
    stand_in: StandIn, make_request: Request
) -> None:
    """Three times `sglang.idle_seconds`; when the server falls silent, it is given up after one of them."""
    ended = threading.Event()
    works = {"queued": True}

    def generating(handler: Any, body: dict[str, Any]) -> None:
        if body["rid"] == "r1":
            ended.wait(20)
            if works["queued"]:
                handler.events(chunk([5], 1, finish=STOP))
        else:
            handler.events(*(chunk([5], n) for n in range(1, 16)), chunk([7], 16, finish=STOP), pause=0.1)
            ended.set() if works["queued"] else None

    stand_in.answers["/generate"] = generating

    async def run() -> list[Any]:
        progress = Progress()
        options: dict[str, Any] = {"vocab_size": 83, "context_length": 128, "incremental": True, "idle_seconds": 0.5}
        ways = [SglangEndpoint(Connection("engine 0", stand_in.url), progress=progress, **options) for _ in range(2)]
        asked = make_request(max_new_tokens=16)
        began = time.monotonic()
        found = await asyncio.gather(
            ways[0].generate(make_request()), ways[1].generate(replace(asked, request_id="r2")), return_exceptions=True
        )
        await asyncio.gather(*(way.close() for way in ways))
        return [*found, time.monotonic() - began]

    queued, other, _ = asyncio.run(run())
    assert [part.finish_reason for part in (queued, other)] == ["stop", "stop"]
    works["queued"] = False
    ended.clear()
    queued, other, seconds = asyncio.run(run())
    ended.set()
    assert "no new token of request r1" in str(queued)
    assert queued.hangs, "by then it brought nobody a token"
    assert other.finish_reason == "stop"
    assert seconds > 1.5, "it waited as long as the other request brought tokens"


def test_silence_is_the_servers_over_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is set: two requests, of which one is brought tokens, and then nobody is."""
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)

    async def run() -> None:
        nonlocal now
        progress = Progress()
        assert progress.silence() == Silence(seconds=0.0, is_first=True)
        async with progress.limit(600.0):
            now += 5.0
            assert progress.silence() == Silence(seconds=5.0, is_first=True)
            async with progress.limit(600.0) as brought:
                now += 1.0
                assert progress.silence().seconds == 6.0, "one that comes later is no sign of life"
                brought()
                now += 2.0
                assert progress.silence() == Silence(seconds=2.0, is_first=False)
            assert progress.silence().seconds == 2.0
        now += 50.0
        assert progress.silence() == Silence(seconds=0.0, is_first=False)

    asyncio.run(run())


@pytest.mark.parametrize("works_for_others", [True, False])
def test_silence_outlives_requests_that_are_given_up_for_it(works_for_others: bool) -> None:
    """But not those that a server has forgotten which works for others: they are given up after ten times as long."""

    async def run() -> tuple[float, float]:
        progress, over = Progress(), asyncio.Event()

        async def others() -> None:
            while works_for_others and not over.is_set():
                async with progress.limit(0.1) as brought:
                    brought()
                await asyncio.sleep(0.02)

        helping, began = asyncio.create_task(others()), time.monotonic()
        with pytest.raises(TimeoutError):
            async with progress.limit(0.1):
                await asyncio.sleep(30)
        took = time.monotonic() - began
        over.set()
        await helping
        return took, progress.silence().seconds

    took, silent = asyncio.run(run())
    if works_for_others:
        assert took >= 1.0
        assert silent == 0.0
    else:
        assert silent >= 0.1


def test_silence_outlives_requests_that_come_and_are_cancelled_after_others_were_given_up() -> None:
    """As those are that waited for its slot, when the call that sent all of them fails."""

    async def run() -> float:
        progress = Progress()

        async def ask() -> None:
            async with progress.limit(0.2):
                await asyncio.sleep(30)

        with pytest.raises(TimeoutError):
            await ask()
        late = asyncio.create_task(ask())
        await asyncio.sleep(0.02)
        late.cancel()
        await asyncio.wait([late])
        return progress.silence().seconds

    assert asyncio.run(run()) >= 0.2


def test_a_server_that_compiles_has_longer_until_its_first_token(stand_in: StandIn, make_request: Request) -> None:
    def compiling(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(1.5)
        handler.events(chunk([5], 1, finish=STOP))

    stand_in.answers["/generate"] = compiling

    async def run() -> list[Any]:
        way = SglangEndpoint(
            Connection("engine 0", stand_in.url), vocab_size=83, context_length=128, incremental=True,
            idle_seconds=0.5, first_seconds=30.0,
        )  # fmt: skip
        found = [(await asyncio.gather(way.generate(make_request()), return_exceptions=True))[0] for _ in range(2)]
        await way.close()
        return found

    first, second = asyncio.run(run())
    assert first.finish_reason == "stop"
    assert "no new token of request r1 for 0.5 s" in str(second), "it has compiled, and hangs"


def test_an_interruption_of_all_requests_can_spare_those_of_others(stand_in: StandIn, make_request: Request) -> None:
    released = threading.Event()
    stand_in.answers["/generate"] = lambda handler, body: released.wait(20)

    async def run(spares_others: bool) -> list[Any]:
        stand_in.seen.clear()
        way = SglangEndpoint(
            Connection("engine 0", stand_in.url), vocab_size=83, context_length=128, incremental=True,
            spares_others=spares_others,
        )  # fmt: skip
        asked = [asyncio.create_task(way.generate(replace(make_request(), request_id=name))) for name in ("a", "b")]
        while stand_in.paths().count("/generate") < 2:
            await asyncio.sleep(0.01)
        await way.abort(None)
        told = sorted(str(body["rid"]) for path, body in stand_in.seen if path == "/abort_request")
        everybody = any(body.get("abort_all") for path, body in stand_in.seen if path == "/abort_request")
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await way.close()
        return [told, everybody]

    assert asyncio.run(run(True)) == [["a", "b"], False]
    assert asyncio.run(run(False)) == [[""], True]
    released.set()


def test_a_server_that_dies_while_it_is_told_to_drop_a_request_is_no_news(
    stand_in: StandIn, make_request: Request
) -> None:
    """The engine was lost and its requests were taken back twice over; only that may be heard of."""
    told, released = threading.Event(), threading.Event()
    unheard: list[dict[str, Any]] = []
    stand_in.answers["/generate"] = lambda handler, body: released.wait(20)

    def die(handler: Any, body: dict[str, Any]) -> None:
        told.set()
        released.wait(20)
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    stand_in.answers["/abort_request"] = die

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
        server = SglangEndpoint(
            Connection("engine 0", stand_in.url), vocab_size=83, context_length=128, incremental=True
        )
        task = asyncio.create_task(server.generate(make_request()))
        while ("/generate" not in stand_in.paths()) or not task.cancel():
            await asyncio.sleep(0.01)
        while not told.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        released.set()
        await asyncio.sleep(0.3)
        gc.collect()
        await server.close()

    asyncio.run(run())
    assert unheard == []


def test_progress_and_not_the_whole_time_is_limited(stand_in: StandIn, make_request: Request) -> None:
    events = [chunk([5], i + 1) for i in range(7)] + [chunk([7], 8, finish=STOP)]
    answer_with(stand_in, *events, pause=0.3)
    assert len(generate(stand_in.url, make_request(), idle=1.5).token_ids) == 8


def test_check_tells_the_version(stand_in: StandIn) -> None:
    async def check() -> int:
        endpoint = SglangEndpoint(
            Connection("engine 0", stand_in.url), vocab_size=83, context_length=128, incremental=True
        )
        try:
            return await endpoint.check()
        finally:
            await endpoint.close()

    assert asyncio.run(check()) == 3
    stand_in.answers["/model_info"] = {"weight_version": "default"}
    assert asyncio.run(check()) == -1
    stand_in.answers["/model_info"] = {"weight_version": "tuesday"}
    with pytest.raises(EndpointError, match="tells no weight version"):
        asyncio.run(check())


def test_a_response_of_a_server_that_comes_back_is_asked_for_over_its_new_connections(make_request: Request) -> None:
    """As when one at `sglang.urls` rejoins during an evaluation: its old connections are closed under a request."""
    asked = threading.Event()
    released = threading.Event()

    def stall(handler: Any, body: dict[str, Any]) -> None:
        asked.set()
        released.wait(20)

    sampling = make_request(stops=(7,)).sampling

    async def ask(old_url: str, new_url: str) -> tuple[list[int], int]:
        options: dict[str, Any] = {"vocab_size": 83, "context_length": 128, "incremental": True}
        old, new = (SglangEndpoint(Connection("engine 0", url), **options) for url in (old_url, new_url))
        pool = EndpointPool([old], in_flight=2, retries=2)
        prompt = Prompt(prompt_id="p", domain="math", token_ids=np.arange(3), reference="")
        waiting = asyncio.create_task(pool.generate([prompt], num_responses=1, sampling=sampling, seed=1))
        while not asked.is_set():
            await asyncio.sleep(0.01)
        pool.endpoints[0] = new
        await old.close()
        with pytest.raises(EndpointError, match="its connections were closed") as closed:
            await old.check()
        assert closed.value.retry
        try:
            (group,) = await waiting
            return group.rollouts[0].response_ids.tolist(), pool.failures
        finally:
            await new.close()

    with standing_in() as before, standing_in() as after:
        before.answers["/generate"] = stall
        answer_with(after, chunk([5], 1), chunk([7], 2, finish=STOP))
        try:
            assert asyncio.run(ask(before.url, after.url)) == ([5, 7], 1)
        finally:
            released.set()
