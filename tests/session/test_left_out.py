"""A server that no longer gets what is published is not well and asked for nothing; a proof leaves one out, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_klear.config.serving import SglangSettings, WeightSyncSettings
from megatron_klear.conformance.compare import architecture
from megatron_klear.conformance.reference import reference_model
from megatron_klear.errors import WeightSyncError
from megatron_klear.model import hf_config
from megatron_klear.records import Prompt
from megatron_klear.rollout import SamplingParams
from megatron_klear.rollout.endpoint import EndpointError
from megatron_klear.rollout.sglang import Expected, ServerFleet, SglangEngine
from megatron_klear.session.probe import Probe
from megatron_klear.weight_sync import EngineGroup, WeightFiles, restore
from megatron_klear.weight_sync.buckets import bucketed
from tests.rollout.sglang.conftest import VOCAB, Answer, Handler, StandIn, chunk, standing_in

TOKENS = np.array([5, 6, 7])
SAID = np.array([0.0, -1.5, -2.0], np.float32)
PROBE = Probe(token_ids=TOKENS, logprobs=SAID)


@pytest.fixture
def stand_ins() -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        yield [stack.enter_context(standing_in()) for _ in range(3)]


@pytest.fixture
def engine(stand_ins: list[StandIn]) -> Iterator[SglangEngine]:
    expected = Expected(vocab_size=VOCAB, longest_sequence=64)
    made = SglangEngine([one.url for one in stand_ins], SglangSettings(), expected, in_flight=4)
    yield made
    made.close()


def scoring(logprobs: Any = SAID, *, seconds: float = 0.0) -> Answer:
    """Says so of any sequence, after a while."""

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        entries = [[None, 5, None], *([float(logprob), 0, None] for logprob in logprobs[1:])]
        handler.reply(200, {"meta_info": {"input_token_logprobs": entries}})

    return answer


def dying(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True


def proved(engine: SglangEngine, group: EngineGroup, seconds: float = 5.0) -> list[float]:
    """Prove them; returns when `waiting` was called."""
    waits: list[float] = []
    settings = WeightSyncSettings(timeout_seconds=seconds)
    PROBE.prove(engine, engine.engines, group, settings, lambda: waits.append(time.monotonic()))
    return waits


def test_its_checks_fail_and_it_is_asked_for_nothing(stand_ins: list[StandIn], engine: SglangEngine) -> None:
    group = EngineGroup([one.caller for one in engine.engines], 5.0)
    engine.is_in_use = lambda caller: caller in group.callers
    # The manager's way to it, made while all was well; its label is still that of the weights in use.
    endpoints = [engine.another_endpoint(index) for index in range(3)]

    async def checked(index: int) -> int:
        version = await endpoints[index].check()
        await endpoints[index].close()
        return version

    assert engine.answering(3) == [0, 1, 2]
    group.leave(engine.engines[1].caller)
    assert engine.answering(3) == [0, 2]
    assert asyncio.run(checked(0)) == 3
    with pytest.raises(EndpointError, match=r"engine 1 .*left out of a publish") as error:
        asyncio.run(checked(1))
    assert error.value.retry

    for one in stand_ins:
        done = chunk([8], 1, finish={"type": "length", "length": 1})
        one.answers["/generate"] = lambda handler, body, done=done: handler.events(done)
        one.seen.clear()
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=1, stop_token_ids=())
    prompts = [Prompt(prompt_id=f"p{i}", domain="math", token_ids=TOKENS, reference="") for i in range(4)]
    engine.generate(prompts, num_responses=1, sampling=sampling, seed=1)
    assert [one.paths().count("/generate") for one in stand_ins] == [2, 0, 2]


def test_all_are_asked_at_once_and_who_gives_no_answer_is_done_without(
    stand_ins: list[StandIn], engine: SglangEngine
) -> None:
    stand_ins[0].answers["/generate"] = dying
    stand_ins[1].answers["/generate"] = stand_ins[2].answers["/generate"] = scoring(seconds=1.0)
    group = EngineGroup([one.caller for one in engine.engines], 5.0)
    group.least = 0
    start = time.monotonic()
    waits = proved(engine, group)
    assert time.monotonic() - start < 1.9, "one after the other they take two seconds"
    assert max(np.diff([start, *waits, time.monotonic()])) < 0.6, "other ranks must hear that the first one lives"
    assert group.callers == tuple(one.caller for one in engine.engines[1:])

    stand_ins[1].answers["/generate"] = scoring(seconds=3.0)
    stand_ins[2].answers["/generate"] = scoring()
    proved(engine, group, seconds=1.0)
    assert group.callers == (engine.engines[2].caller,), "one that hangs, too"


def test_it_is_an_error_where_it_cannot_be_done_without(stand_ins: list[StandIn], engine: SglangEngine) -> None:
    for one in stand_ins:
        one.answers["/generate"] = scoring()
    group = EngineGroup([one.caller for one in engine.engines], 5.0)
    stand_ins[1].answers["/generate"] = dying
    with pytest.raises(EndpointError, match="engine 1 "):
        proved(engine, group)
    group.least = 0
    stand_ins[1].answers["/generate"] = lambda handler, body: handler.reply(200, {"meta_info": {}})
    with pytest.raises(EndpointError, match=r"engine 1 .*no logprobs of a given sequence"):
        proved(engine, group)
    stand_ins[1].answers["/generate"] = scoring(SAID + np.float32(0.5))
    with pytest.raises(WeightSyncError, match=r"engine 1 .*up to 0\.5 nats, more than weight_sync.logprob_tolerance"):
        proved(engine, group)
    assert len(group.callers) == 3


def test_a_real_server_is_proved_before_it_gets_its_version(sglang_settings: SglangSettings, tmp_path: Path) -> None:
    """Once as one of ours that has just started, once as one of others, which may have anything in it."""
    arch, tokens = architecture(tied=False), np.random.default_rng(3).integers(0, VOCAB, 40)
    files, settings = WeightFiles(tmp_path / "weights", hf_config(arch, dtype="float32"), keep=1), WeightSyncSettings()
    shape: dict[str, Any] = {"dtype": "float32", "on_cpu": True, "batch_responses": 4, "longest_sequence": 96}
    with ServerFleet(sglang_settings, hf_config(arch, dtype="float32"), tmp_path, **shape) as fleet:
        [url] = fleet.start_all()
        engine = SglangEngine([url], sglang_settings, Expected(vocab_size=VOCAB, longest_sequence=64), in_flight=4)
        group = EngineGroup([engine.engines[0].caller], 60.0)
        labels = [-1]
        for version, sent_to_tp in ((4, None), (5, 1)):
            model = reference_model(arch, seed=version)
            files.begin(version)
            for bucket in bucketed(model.named_parameters(), 2**20):
                files.write(bucket)
            weights = files.complete()
            with torch.no_grad():
                logits = model.double()(torch.from_numpy(tokens).unsqueeze(0)).logits[0, :-1]
            picked = torch.log_softmax(logits, dim=-1).gather(-1, torch.from_numpy(tokens[1:]).unsqueeze(-1))
            exact = np.concatenate([[0.0], picked.squeeze(-1).numpy()]).astype(np.float32)
            for wrong in (np.float32(0.5), np.float32(0.0)):
                probe = Probe(token_ids=tokens, logprobs=exact + wrong)
                engine.use_version(version)
                restoring = partial(
                    restore, group, weights, version=version, expected=None, sent_to_tp=sent_to_tp,
                    prove=partial(probe.prove, engine, engine.engines, group, settings, lambda: None),
                )  # fmt: skip
                if wrong:
                    with pytest.raises(WeightSyncError, match=r"differ from the trainer's by up to 0\.5"):
                        restoring()
                    assert engine.answering(labels[-1]) == [0], "it still says the version that it had"
                else:
                    restoring()
                    assert engine.answering(version) == [0]
            labels.append(version)
        engine.close()
