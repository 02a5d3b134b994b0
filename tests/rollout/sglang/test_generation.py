"""Responses of a real server against transformers with the same weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear.config.serving import SglangSettings
from megatron_klear.config.yarn import Yarn
from megatron_klear.conformance.compare import architecture
from megatron_klear.conformance.matrix import SLACK
from megatron_klear.conformance.reference import reference_model
from megatron_klear.errors import ConfigError, RolloutError
from megatron_klear.records import Prompt, RolloutGroup
from megatron_klear.rollout import ProgressCallback, RolloutProgress, SamplingParams
from megatron_klear.rollout.cached import CachedSampler
from megatron_klear.rollout.endpoint import EndpointError, GenerationRequest
from megatron_klear.rollout.response_cache import ResponseCache
from megatron_klear.rollout.sglang import Expected, SglangEngine
from megatron_klear.rollout.sglang.answers import AnswerReader
from megatron_klear.rollout.sglang.connection import Connection
from megatron_klear.rollout.sglang.endpoint import SglangEndpoint
from megatron_klear.weight_sync import EngineGroup, TensorTransport
from megatron_klear.weight_sync.buckets import bucketed, converted

VOCAB = 83
SEED = 50


@pytest.fixture(scope="module")
def engines(sglang_urls: dict[str, str]) -> Iterator[dict[str, SglangEngine]]:
    """An engine by data type, with the weights of `reference_model(seed=SEED)` as version 50."""
    made = {}
    for dtype, url in sglang_urls.items():
        expected = Expected(vocab_size=VOCAB, longest_sequence=96)
        engine = SglangEngine([url], SglangSettings(stream_interval=4), expected, in_flight=16)
        group = EngineGroup([e.caller for e in engine.engines], 120.0)
        transport = TensorTransport(group, tp=1, by_value=True)
        weights = reference_model(architecture(tied=False), seed=SEED).named_parameters()
        transport.begin(SEED)
        for bucket in bucketed(converted(weights, getattr(torch, dtype)), 2**20):
            transport.send(bucket)
        transport.finish()
        group.call("/flush_cache", {})
        group.call("/update_weight_version", {"new_version": str(SEED), "abort_all_requests": False})
        engine.use_version(SEED)
        made[dtype] = engine
    yield made
    for engine in made.values():
        engine.close()


def test_a_real_server_tells_enough_of_its_rotary_embedding(sglang_urls: dict[str, str]) -> None:
    def connect(yarn: Yarn | None) -> None:
        expected = Expected(vocab_size=VOCAB, longest_sequence=96, yarn=yarn)
        SglangEngine([sglang_urls["float32"]], SglangSettings(), expected, in_flight=1).close()

    connect(None)
    with pytest.raises(ConfigError, match=r"computes with no YaRN, ours YaRN of factor 2 from 64 positions"):
        connect(Yarn(factor=2.0, original_positions=64))


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [
        Prompt(prompt_id=f"p{i}", domain="math", token_ids=rng.integers(0, VOCAB, length), reference="")
        for i, length in enumerate((1, 6, 17, 40))
    ]


def expected_logprobs(group: RolloutGroup, index: int, dtype: str, temperature: float) -> np.ndarray[Any, Any]:
    model = reference_model(architecture(tied=False), seed=SEED).to(getattr(torch, dtype))
    ids = np.concatenate([group.prompt.token_ids, group.rollouts[index].response_ids])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).unsqueeze(0)).logits[0, :-1].double()
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    found = logprobs.gather(-1, torch.from_numpy(ids[1:]).unsqueeze(-1)).squeeze(-1).numpy()
    return found[len(group.prompt.token_ids) - 1 :]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_are_transformers_at_the_sampling_temperature(
    engines: dict[str, SglangEngine], dtype: str, temperature: float, top_p: float
) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_response_tokens=30, stop_token_ids=(7, 11))
    groups = engines[dtype].generate(prompts(), num_responses=3, sampling=sampling, seed=3)
    assert [g.prompt.prompt_id for g in groups] == ["p0", "p1", "p2", "p3"]
    worst, plain = 0.0, 0.0
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            ids = rollout.response_ids
            ended = ids[-1] in (7, 11)
            assert not np.isin(ids[:-1], (7, 11)).any()
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert ended or len(ids) == 30
            assert rollout.policy_versions == ((SEED, len(ids)),)
            exact = expected_logprobs(group, index, "float64", temperature)
            worst = max(worst, float(np.abs(rollout.rollout_logprobs - exact).max()))
            plain = max(plain, float(np.abs(expected_logprobs(group, index, dtype, temperature) - exact).max()))
    assert 0.0 < worst <= SLACK * plain
    if temperature == 0.0:
        assert all(len({tuple(r.response_ids) for r in g.rollouts}) == 1 for g in groups if dtype == "float32")
    else:
        assert any(len({tuple(r.response_ids) for r in g.rollouts}) > 1 for g in groups)


def test_a_given_sequence_is_scored(engines: dict[str, SglangEngine]) -> None:
    prompt = prompts()[3]
    engine = engines["float32"]
    scored = engine.score(engine.engines[0], prompt.token_ids, timeout_seconds=60.0)
    model = reference_model(architecture(tied=False), seed=SEED).double()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.from_numpy(prompt.token_ids).unsqueeze(0)).logits[0, :-1], dim=-1)
    exact = logprobs.gather(-1, torch.from_numpy(prompt.token_ids[1:]).unsqueeze(-1)).squeeze(-1).numpy()
    assert scored[0] == 0.0
    np.testing.assert_allclose(scored[1:], exact, atol=1e-4)


def test_responses_of_a_group_share_what_was_computed_of_their_prompt(
    engines: dict[str, SglangEngine], sglang_urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first find every token in the server's cache but the last, whose logits are needed."""
    cached: list[int] = []
    add = AnswerReader.add

    def noted(reader: AnswerReader, chunk: Any) -> None:
        add(reader, chunk)
        if chunk["meta_info"]["finish_reason"] is not None:
            cached.append(chunk["meta_info"]["cached_tokens"])

    monkeypatch.setattr(AnswerReader, "add", noted)
    rng = np.random.default_rng(1234)
    group = [Prompt(prompt_id="g", domain="math", token_ids=rng.integers(0, VOCAB, 48), reference="")]
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, stop_token_ids=())
    # One at a time: two that come in the same moment are computed together, each by itself.
    expected = Expected(vocab_size=VOCAB, longest_sequence=96)
    engine = SglangEngine([sglang_urls["float32"]], SglangSettings(stream_interval=4), expected, in_flight=1)
    try:
        engine.use_version(SEED)
        engine.generate(group, num_responses=4, sampling=sampling, seed=1)
        assert cached[0] < 8, "a few tokens may be another prompt's, too"
        assert cached[1:] == [47, 47, 47]
        # Requests that name another version of the weights share nothing with these.
        engine.use_version(SEED + 1)
        request = GenerationRequest(
            request_id="another version", token_ids=group[0].token_ids, max_new_tokens=8, sampling=sampling, seed=1
        )
        engine._loop.run(engine.engines[0].endpoint.generate(request))
        assert cached[4:] == [0]
    finally:
        engine.close()


def test_an_aborted_request_returns_its_part(engines: dict[str, SglangEngine]) -> None:
    endpoint = engines["float32"].engines[0].endpoint
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=85, stop_token_ids=())
    request = GenerationRequest(
        request_id="to abort", token_ids=np.array([1, 2, 3]), max_new_tokens=85, sampling=sampling, seed=1
    )

    async def interrupted() -> Any:
        begun = asyncio.Event()
        task = asyncio.create_task(endpoint.generate(request, lambda tokens: begun.set()))
        await begun.wait()
        await endpoint.abort("to abort")
        return await task

    part = engines["float32"]._loop.run(interrupted())
    assert part.finish_reason == "abort"
    assert 0 < len(part.token_ids) < 85
    assert part.policy_versions == ((SEED, len(part.token_ids)),)


def test_a_context_is_filled_to_its_last_token(engines: dict[str, SglangEngine]) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=56, stop_token_ids=())
    (group,) = engines["float32"].generate(prompts()[3:], num_responses=1, sampling=sampling, seed=1)
    assert len(group.rollouts[0].response_ids) == 56
    request = GenerationRequest(
        request_id="last", token_ids=np.arange(95) % VOCAB, max_new_tokens=1, sampling=sampling, seed=1
    )  # an interrupted response that wants its last token
    endpoint = engines["float32"].engines[0].endpoint
    assert len(engines["float32"]._loop.run(endpoint.generate(request)).token_ids) == 1


def test_responses_of_a_server_are_kept_one_by_one_and_drawn_once(
    engines: dict[str, SglangEngine], sglang_urls: dict[str, str], tmp_path: Path
) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=40, stop_token_ids=(7,))
    # One at a time: a quick machine is done with many at once before it is interrupted.
    expected = Expected(vocab_size=VOCAB, longest_sequence=96)
    one_at_a_time = SglangEngine([sglang_urls["float32"]], SglangSettings(stream_interval=4), expected, in_flight=1)
    one_at_a_time.use_version(SEED)  # which `engines` gave the server

    def sample(cache: ResponseCache, on_progress: ProgressCallback | None = None) -> tuple[CachedSampler, list[Any]]:
        sampler = CachedSampler(one_at_a_time, cache, model="m", sampling=sampling, seed=5)
        return sampler, list(sampler.sample(prompts(), num_responses=6, on_progress=on_progress))

    def interrupt(progress: RolloutProgress) -> None:
        if progress.finished_responses >= 3:
            raise KeyboardInterrupt

    with ResponseCache(tmp_path / "c") as cache:
        with pytest.raises(KeyboardInterrupt):
            sample(cache, interrupt)
        kept = len(cache)
        assert 3 <= kept < 24
    with ResponseCache(tmp_path / "c") as cache:
        sampler, groups = sample(cache)
        assert (sampler.found, sampler.drawn, len(cache)) == (kept, 24 - kept, 24)
        exact = expected_logprobs(groups[2], 4, "float64", 1.0)
        np.testing.assert_allclose(groups[2].rollouts[4].rollout_logprobs, exact, atol=1e-4)
        sampler, again = sample(cache)
        assert (sampler.found, sampler.drawn) == (24, 0)
    one_at_a_time.close()
    assert [r.response_ids.tolist() for g in groups for r in g.rollouts] == [
        r.response_ids.tolist() for g in again for r in g.rollouts
    ]


def test_what_a_real_server_refuses_is_wrong_everywhere(sglang_urls: dict[str, str]) -> None:
    """It answers with status 200 and refuses in the stream."""

    async def ask() -> None:
        connection = Connection("engine 0", sglang_urls["float32"])
        endpoint = SglangEndpoint(connection, vocab_size=VOCAB, context_length=10_000, incremental=True)
        sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, stop_token_ids=(7,))
        ids = np.ones(4000, dtype=np.int64)
        try:
            await endpoint.generate(
                GenerationRequest(request_id="r1", token_ids=ids, max_new_tokens=8, sampling=sampling, seed=1)
            )
        finally:
            await endpoint.close()

    with pytest.raises(RolloutError, match=r"engine 0 refuses request r1 of 4000 tokens: .*look at") as error:
        asyncio.run(ask())
    assert not isinstance(error.value, EndpointError)
