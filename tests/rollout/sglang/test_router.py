"""Servers behind SGLang's router: a real router, before stand-ins and before a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from megatron_klear.config.serving import SglangSettings
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.records import Prompt
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import EndpointError, GenerationRequest
from megatron_klear.rollout.sglang import Connection, Expected, SglangEndpoint, SglangEngine
from megatron_klear.rollout.sglang.router import RoutedEndpoint, require_workers
from tests.rollout.sglang.conftest import VOCAB, Handler, StandIn, chunk, standing_in

OPTIONS: dict[str, Any] = {"vocab_size": VOCAB, "context_length": 512, "incremental": True, "stream_interval": 1}


@pytest.fixture
def two() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        made = [stack.enter_context(standing_in()) for _ in range(2)]
        for number, stand_in in enumerate(made):
            stand_in.answers["/health"] = {}
            stand_in.answers["/generate"] = answering(number)
        yield made


def answering(number: int) -> Callable[[Handler, dict[str, Any]], None]:
    """A token of its own, then 9, then the end; a first token of 80 is refused."""

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if body["input_ids"][0] == 80:
            handler.reply(400, {"error": {"message": "too long for me"}})
        else:
            finish = {"type": "stop", "matched": 9}
            handler.events(chunk([number + 1], 1), chunk([9], 2, finish=finish), pause=0.05)

    return answer


def routed(url: str, workers: list[StandIn]) -> RoutedEndpoint:
    made = [SglangEndpoint(Connection(f"engine {i}", w.url), **OPTIONS) for i, w in enumerate(workers)]
    return RoutedEndpoint(Connection("the router", url), made, **OPTIONS)


def test_a_real_router_passes_answers_and_refusals_as_they_are(
    start_router: Callable[..., str], two: list[StandIn], make_request: Callable[..., GenerationRequest]
) -> None:
    url = start_router([stand_in.url for stand_in in two])

    async def run() -> tuple[list[Any], list[int], int]:
        router = Connection("the router", url)
        await require_workers(router, [stand_in.url for stand_in in reversed(two)])
        with pytest.raises(ConfigError, match=r"the router sends to .*, and weights go to .*:1 \(sglang.urls\)"):
            await require_workers(router, ["http://127.0.0.1:1"])
        await router.close()
        endpoint = routed(url, two)
        counts: list[int] = []
        version = await endpoint.check()
        parts = [await endpoint.generate(make_request((5, 6), stops=(9,)), counts.append) for _ in range(4)]
        with pytest.raises(RolloutError, match="the router refuses request r1 of 1 tokens: too long for me"):
            await endpoint.generate(make_request((80,)))
        await endpoint.abort("r1")
        await endpoint.abort(None)
        await endpoint.close()
        return parts, counts, version

    parts, counts, version = asyncio.run(run())
    assert version == 3
    assert sorted(int(part.token_ids[0]) for part in parts) == [1, 1, 2, 2], "both servers were given requests"
    assert all(part.policy_versions == ((3, 2),) and part.finish_reason == "stop" for part in parts)
    assert counts == [1, 2] * 4, "progress comes through while an answer is being made"
    for stand_in in two:
        bodies = [body for path, body in stand_in.seen if path == "/generate" and body["input_ids"] == [5, 6]]
        assert len(bodies) == 2
        for body in bodies:
            assert body["sampling_params"]["sampling_seed"] == 5
            assert body["sampling_params"]["stop_token_ids"] == [9]
            # What keeps prefixes of other weights, also of an earlier life of the trainer, apart must not get lost.
            assert body["extra_key"].startswith("version 3 of ")
            assert body["return_logprob"] is True
            assert body["rid"] == "r1"
        assert [body for path, body in stand_in.seen if path == "/abort_request"] == [
            {"rid": "r1"}, {"rid": "", "abort_all": True}
        ]  # fmt: skip


def test_its_servers_are_asked_themselves_whether_they_live_and_what_they_have(two: list[StandIn]) -> None:
    async def check() -> int:
        endpoint = routed("http://127.0.0.1:9", two)
        try:
            return await endpoint.check()
        finally:
            await endpoint.close()

    assert asyncio.run(check()) == 3
    two[1].answers["/model_info"] = {"weight_version": "2"}
    with pytest.raises(EndpointError, match="weights of different versions: engine 0: 3, engine 1: 2"):
        asyncio.run(check())
    two[1].answers["/model_info"] = lambda handler, body: handler.reply(503, {})
    with pytest.raises(EndpointError, match="engine 1: /model_info answered status 503"):
        asyncio.run(check())


def test_what_is_no_router_is_refused(stand_in: StandIn) -> None:
    settings = SglangSettings(urls=(stand_in.url,), router_url=stand_in.url)
    expected = Expected(vocab_size=VOCAB, longest_sequence=64, tokenizer_samples=())
    with pytest.raises(ConfigError, match=r"router_url: the router .* answered .*must be a running sglang_router"):
        SglangEngine([stand_in.url], settings, expected, in_flight=4)


def test_a_real_server_generates_through_a_real_router(
    start_router: Callable[..., str], sglang_urls: dict[str, str]
) -> None:
    urls = (sglang_urls["float32"],)
    settings = SglangSettings(urls=urls, router_url=start_router(list(urls)), stream_interval=4)
    expected = Expected(vocab_size=VOCAB, longest_sequence=64, tokenizer_samples=())
    engine = SglangEngine(urls, settings, expected, in_flight=8)
    try:
        prompts = [
            Prompt(prompt_id=f"p{i}", domain="math", token_ids=np.arange(3 + i), reference="1", text="")
            for i in range(4)
        ]
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=12, stop_token_ids=())
        groups = engine.generate(prompts, num_responses=3, sampling=sampling, seed=1)
    finally:
        engine.close()
    assert [group.prompt.prompt_id for group in groups] == ["p0", "p1", "p2", "p3"]
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        assert len(rollout.response_ids) == len(rollout.rollout_logprobs) == 12
        assert (rollout.rollout_logprobs < 0).all()
        assert sum(count for _, count in rollout.policy_versions) == 12


def test_an_interruption_behind_a_router_can_spare_the_requests_of_others(two: list[StandIn]) -> None:
    """Which server has a request is not known, so that every one is told of each of ours, and of nothing else."""

    async def run() -> None:
        workers = [SglangEndpoint(Connection(s.url, s.url), **OPTIONS) for s in two]
        endpoint = RoutedEndpoint(Connection("the router", two[0].url), workers, spares_others=True, **OPTIONS)
        endpoint._in_flight |= {"a", "b"}
        await endpoint.abort(None)
        await endpoint.close()

    asyncio.run(run())
    for stand_in in two:
        told = [body for path, body in stand_in.seen if path == "/abort_request"]
        assert sorted(told, key=str) == [{"rid": "a"}, {"rid": "b"}]
